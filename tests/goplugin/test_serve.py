"""A whole plugin, started and called as go-plugin does it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import psutil
import pytest

from engine_plugin.protocol.stubs.goplugin import broker_pb2
from tests.goplugin.hosting import Hosted, end_without_reader, names
from tests.patience import LIMIT, pace, within

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.goplugin.conftest import Launch

DAMAGED = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and unix sockets are for POSIX")


async def end_in_time(plugin: Hosted) -> int:
    """Call Shutdown and wait, as Kill does; go-plugin kills after 2 s."""
    asked = time.monotonic()
    await plugin.shutdown()
    code = await plugin.ended()
    assert time.monotonic() - asked < pace(2.0)
    return code


@pytest.mark.promise("G11", "G12", "G17", "G20", "G34", "G35")
@posix
async def test_plugin_serves_and_exits_0_after_shutdown(launch: Launch, short_dir: Path) -> None:
    """The plugin announces itself, serves, and exits after Shutdown."""
    plugin = await launch()
    assert plugin.line == f"1|1|unix|{plugin.address}|grpc|"
    assert Path(plugin.address).parent.parent == short_dir
    assert await plugin.do("echo", 3) == "yyy"
    assert await end_in_time(plugin) == 0
    assert [line["@message"] for line in plugin.log] == ["stopping: the host asked", "closed"]
    assert names(short_dir) == []


@pytest.mark.promise("G3", "G12")
async def test_tcp_port_is_in_the_range_of_the_host(launch: Launch) -> None:
    plugin = await launch(ENGINE_PLUGIN_TRANSPORT="tcp", PLUGIN_MIN_PORT="20000", PLUGIN_MAX_PORT="25000")
    assert plugin.line.startswith("1|1|tcp|127.0.0.1:2")
    assert plugin.line.endswith("|grpc|")
    assert await plugin.do("echo", 1) == "y"
    assert await end_in_time(plugin) == 0


@pytest.mark.promise("G8", "G15")
async def test_multiplexing_is_declined(launch: Launch) -> None:
    assert (await launch(PLUGIN_MULTIPLEX_GRPC="true")).line.endswith("|grpc||false")


@pytest.mark.promise("G2", "G16")
async def test_version_mismatch_is_left_to_the_host(launch: Launch) -> None:
    assert (await launch(PLUGIN_PROTOCOL_VERSIONS="3,2")).line.startswith("1|1|")


@pytest.mark.promise("G3", "G6", "G7", "G11", "G35")
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PLUGIN_CLIENT_CERT": "-----BEGIN"}, "PLUGIN_CLIENT_CERT holds no certificate in PEM"),
        ({"PLUGIN_CLIENT_CERT": DAMAGED}, "set AutoMTLS to false"),
        (
            {"ENGINE_PLUGIN_TRANSPORT": "tcp", "PLUGIN_MIN_PORT": "9", "PLUGIN_MAX_PORT": "8"},
            "PLUGIN_MIN_PORT (9) is",
        ),
        ({"ENGINE_PLUGIN_TRANSPORT": "smoke"}, "Set it to unix or tcp"),
        ({"TEST_LOAD": "refuse"}, "Run: engine-plugin install"),
        ({"TEST_LOAD": "crash"}, "the plugin crashed"),
        pytest.param({"PLUGIN_UNIX_SOCKET_GROUP": "no-such-group"}, "no group of this system", marks=posix),
        pytest.param({"PLUGIN_UNIX_SOCKET_DIR": "/nonexistent"}, "PLUGIN_UNIX_SOCKET_DIR", marks=posix),
    ],
)
async def test_failed_start_is_logged_without_a_handshake_line(
    start: Launch, variables: dict[str, str], said: str
) -> None:
    """An error in hclog, exit 1, and an empty stdout."""
    plugin = await start(**variables)
    assert await plugin.ended() == 1
    line = await plugin.logged(said)
    assert line["@level"] == "error"
    assert ("ZeroDivisionError" in line.get("exception", "")) == ("crash" in variables.values())
    assert plugin.plain == []


@pytest.mark.promise("G19")
async def test_health_names_the_plugin(launch: Launch) -> None:
    from engine_plugin.protocol.stubs.standard import health_pb2

    plugin = await launch()
    request = health_pb2.HealthCheckRequest(service="plugin")
    answer = await plugin.call("/grpc.health.v1.Health/Check", request, health_pb2.HealthCheckResponse)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.promise("G23")
async def test_reflection_names_all_services(launch: Launch) -> None:
    from engine_plugin.protocol.stubs.standard import reflection_pb2

    plugin = await launch()
    method: Any = plugin.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = method(iter([reflection_pb2.ServerReflectionRequest(list_services="*")]), timeout=LIMIT)
    answer = await call.read()
    assert {service.name for service in answer.list_services_response.service} >= {
        "protocol.ProviderService",
        "plugin.GRPCStdio",
        "plugin.GRPCBroker",
        "plugin.GRPCController",
        "grpc.health.v1.Health",
    }
    call.cancel()


@pytest.mark.promise("G24")
async def test_messages_above_the_default_limit_of_grpcio_pass(launch: Launch) -> None:
    """6 MiB each way, where grpcio alone refuses more than 4."""
    plugin = await launch()
    size = 6 << 20
    assert len(await plugin.do("echo", size, padding="x" * size)) == size


@pytest.mark.promise("G25")
@posix
async def test_connection_closed_without_a_call_is_harmless(launch: Launch) -> None:
    """The first one connects right after the handshake line, when the server must already listen."""
    plugin = await launch()
    for greeting in (b"", b"PRI * HTTP/2.0\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        _, writer = await asyncio.open_unix_connection(plugin.address)
        writer.write(greeting)
        writer.close()
        await writer.wait_closed()
    assert await plugin.do("echo", 1) == "y"


@pytest.mark.promise("G22", "F1")
async def test_broker_stream_stays_open_and_is_drained(launch: Launch) -> None:
    plugin = await launch()
    method = plugin.channel.stream_stream(
        "/plugin.GRPCBroker/StartStream",
        request_serializer=broker_pb2.ConnInfo.SerializeToString,
        response_deserializer=broker_pb2.ConnInfo.FromString,
    )
    call = method(timeout=LIMIT)
    for number in range(3):
        await call.write(broker_pb2.ConnInfo(service_id=number, network="unix", address="/x"))
    assert await plugin.do("echo", 1) == "y"
    assert not call.done()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


@pytest.mark.promise("G20", "G34", "F1")
async def test_streams_held_by_the_host_do_not_delay_the_exit(launch: Launch) -> None:
    plugin = await launch()
    call: Any = plugin.channel.stream_stream("/plugin.GRPCBroker/StartStream")(timeout=LIMIT)
    await call.write(b"")
    output = asyncio.create_task(plugin.printed_until(b"never"))
    working = asyncio.create_task(plugin.do("wait"))
    assert await plugin.do("echo", 1) == "y"
    assert await end_in_time(plugin) == 0
    assert await within(output) == b""
    with pytest.raises(grpc.aio.AioRpcError):
        await within(working)
    call.cancel()


@pytest.mark.promise("G11", "G21", "G31")
async def test_printed_output_reaches_the_host_by_stdio_stream(launch: Launch) -> None:
    """Before and after the handshake, by the plugin and by its children."""
    plugin = await launch(TEST_LOAD="print")
    output = asyncio.create_task(plugin.printed_until(b"twice"))
    for word in ("once", "twice"):
        await plugin.do("print", word)
    lines = [b"noise before the handshake", b"x" * 100_000 + b"noise of a child", b"once", b"twice"]
    assert (await within(output)).splitlines() == lines


@pytest.mark.promise("G21")
async def test_output_before_the_exit_arrives(launch: Launch) -> None:
    """The stream ends with the plugin, after all that was printed."""
    plugin = await launch()
    output = asyncio.create_task(plugin.printed_until(b"never"))
    await plugin.do("print", "goodbye")
    assert await end_in_time(plugin) == 0
    assert (await within(output)).split() == [b"goodbye"]


@pytest.mark.promise("G31")
async def test_unread_flood_of_output_does_not_block_the_plugin(launch: Launch) -> None:
    """Lines of 80 KB and 10 MB, printed by the event loop itself."""
    plugin = await launch()
    await plugin.do("flood", [80_000, 10_000_000, 10])
    text = await plugin.printed_until(b"\nxxxxxxxxx\n")
    assert 900_000 < len(text) <= 1 << 20


@pytest.mark.promise("G26", "G29")
async def test_log_reaches_the_host_on_stderr(launch: Launch) -> None:
    plugin = await launch(ENGINE_PLUGIN_LOG="debug")
    serving = await plugin.logged("serving")
    assert (serving["@level"], serving["address"]) == ("debug", plugin.address)
    await plugin.do("log", "two\nlines " + "x" * 100_000)
    line = await plugin.logged("two\nlines xxx")
    assert (line["@level"], line["@module"]) == ("warn", "test")
    assert "characters cut" in line["@message"]
    assert plugin.plain == []


@pytest.fixture
async def child(launch: Launch) -> AsyncIterator[tuple[Hosted, psutil.Process]]:
    """A plugin, and a child that it started without a thought for its standard output and error."""
    plugin = await launch()
    process = psutil.Process(await plugin.do("child", [sys.executable, "-c", "import time; time.sleep(1000)"]))
    try:
        yield plugin, process
    finally:
        process.kill()


@pytest.mark.promise("G32")
async def test_surviving_child_does_not_hold_stdout_and_stderr_open(child: tuple[Hosted, psutil.Process]) -> None:
    """Stdout and stderr end with the plugin, though its child lives on."""
    plugin, process = child
    assert await end_in_time(plugin) == 0
    assert process.is_running()


@pytest.mark.promise("G32")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_child_does_not_inherit_host_variables_or_descriptors(child: tuple[Hosted, psutil.Process]) -> None:
    plugin, process = child

    def pipes(pid: int) -> dict[str, str]:
        found = {}
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the descriptor by which the folder was read
                found[entry.name] = str(entry.readlink())
        return {number: link for number, link in found.items() if link.startswith(("pipe:", "socket:"))}

    hosts = set(pipes(os.getpid()).values())
    stderr = pipes(plugin.process.pid)["2"]
    assert stderr in hosts
    held = pipes(process.pid)
    held.pop("0", None)  # stdin is the host's own, and its end says nothing
    assert hosts.isdisjoint(held.values())


@pytest.mark.promise("G33")
@posix
async def test_interrupt_is_ignored_by_the_plugin_but_not_its_children(launch: Launch) -> None:
    """An engine that inherits the signal handlers must not ignore it."""
    plugin = await launch()
    for _ in range(3):
        plugin.process.send_signal(signal.SIGINT)
    assert await plugin.do("echo", 1) == "y"
    assert "default_int_handler" in await plugin.do("interrupt_handling")


@pytest.mark.promise("G33", "G35")
@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
async def test_termination_signal_ends_the_plugin_gracefully(
    launch: Launch, short_dir: Path, number: signal.Signals
) -> None:
    plugin = await launch()
    sent = time.monotonic()
    plugin.process.send_signal(number)
    assert await plugin.ended() == 0
    assert time.monotonic() - sent < pace(2.0)
    assert [line["@message"] for line in plugin.log] == [f"stopping: {number.name}", "closed"]
    assert names(short_dir) == []


@pytest.mark.promise("G11", "G33")
@posix
@pytest.mark.parametrize("when", ["hang", "terminate"])
async def test_signal_while_loading_ends_the_plugin(start: Launch, short_dir: Path, when: str) -> None:
    plugin = await start(TEST_LOAD=when)
    if when == "hang":
        await plugin.logged("loading")
        plugin.process.send_signal(signal.SIGTERM)
    assert await plugin.ended() == 0
    await plugin.logged("stopping while loading: SIGTERM")
    assert names(short_dir) == []


@pytest.mark.promise("G34")
@pytest.mark.parametrize(
    ("aclose", "code", "said"),
    [
        ("hang", 0, "the plugin did not stop within"),
        ("error", 0, "the plugin did not stop cleanly: the engine would not stop"),
        ("swallow", 0, "the plugin did not stop within"),
        ("block", 1, "the plugin did not exit within"),
    ],
)
async def test_engine_that_does_not_stop_is_left_within_the_time_of_the_host(
    launch: Launch, short_dir: Path, aclose: str, code: int, said: str
) -> None:
    """Gone before the host's patience of 2 s, whatever hangs; and it is said."""
    plugin = await launch(TEST_ACLOSE=aclose)
    assert await end_in_time(plugin) == code
    assert (await plugin.logged(said))["@level"] == "error"
    assert names(short_dir) == []


@pytest.mark.promise("G34")
async def test_running_executor_thread_does_not_delay_the_exit(launch: Launch) -> None:
    """Asyncio and the interpreter wait for an executor's threads; the plugin does not."""
    plugin = await launch()
    await plugin.do("executor", 1000)
    assert await end_in_time(plugin) == 0


@pytest.mark.promise("U2")
@posix
@pytest.mark.parametrize(("way", "busy"), [("Shutdown", False), ("SIGTERM", True)])
async def test_plugin_exits_where_no_thread_can_be_created(
    launch: Launch, short_dir: Path, way: str, busy: bool
) -> None:
    """Whether the executor has a live worker thread, and whether that is `busy`."""
    plugin = await launch()
    if busy:
        await plugin.do("executor", 1000)
    await plugin.do("refuse_threads")
    if way == "Shutdown":
        await plugin.shutdown()
    else:
        plugin.process.send_signal(signal.SIGTERM)
    assert await plugin.ended() == 0
    await plugin.logged("closed")
    assert names(short_dir) == []
    assert not [line for line in plugin.log if line["@level"] == "error"]


@pytest.mark.promise("U2")
@posix
async def test_blocked_event_loop_is_ended_where_no_thread_can_be_created(launch: Launch) -> None:
    plugin = await launch(TEST_ACLOSE="block")
    await plugin.do("refuse_threads")
    await plugin.shutdown()
    assert await plugin.ended() == 1
    await plugin.logged("did not exit within")


@pytest.mark.promise("G34")
@posix
async def test_blocked_event_loop_is_ended(launch: Launch) -> None:
    plugin = await launch()
    blocked = asyncio.create_task(plugin.do("block", 1000))
    await plugin_is_blocked(plugin)
    plugin.process.send_signal(signal.SIGTERM)
    plugin.process.send_signal(signal.SIGTERM)
    assert await plugin.ended() == 1
    with pytest.raises(grpc.aio.AioRpcError):
        await within(blocked)


async def plugin_is_blocked(plugin: Hosted) -> None:
    """Return once a call shows that the plugin's loop is blocked."""
    while True:
        try:
            await asyncio.wait_for(plugin.do("echo", 1), pace(0.3))
        except TimeoutError:
            return


@pytest.mark.promise("G36")
@posix
@pytest.mark.parametrize("aclose", ["", "hang"])
async def test_plugin_exits_when_its_host_is_killed(short_dir: Path, aclose: str) -> None:
    """The plugin stops its engine and removes its socket."""
    host = await Hosted.start("tests.goplugin.middleman", PLUGIN_UNIX_SOCKET_DIR=str(short_dir), TEST_ACLOSE=aclose)
    try:
        await host.announced()
        assert await host.do("echo", 1) == "y"
        host.process.kill()
        killed = time.monotonic()
        await host.ended()  # stderr is the plugin's too, so it has ended as well
        assert time.monotonic() - killed < pace(2.5)
        await host.logged("stopping: the host has died")
        assert names(short_dir) == []
    finally:
        await host.close()


@pytest.mark.promise("G36")
@posix
async def test_plugin_exits_when_its_host_dies_before_the_handshake(short_dir: Path) -> None:
    """The handshake line has no reader."""
    assert await end_without_reader(short_dir) == 0
    assert names(short_dir) == []


@pytest.mark.promise("G9")
async def test_stdin_is_not_read(launch: Launch) -> None:
    """Neither its end nor its content has an effect."""
    plugin = await launch()
    assert plugin.process.stdin is not None
    plugin.process.stdin.write(b"exit\n")
    plugin.process.stdin.close()
    assert await plugin.do("echo", 1) == "y"
    assert await end_in_time(plugin) == 0


@pytest.mark.promise("G18")
@posix
async def test_socket_of_a_killed_plugin_is_removed_by_the_next(launch: Launch, short_dir: Path) -> None:
    """The socket of a running plugin stays."""
    killed, living = await launch(), await launch()
    for plugin in (killed, living):
        directory = Path(plugin.address).parent
        os.utime(directory, (0, 0))
    killed.process.kill()
    await killed.ended()
    third = await launch()
    left = {Path(plugin.address).parent.name for plugin in (living, third)}
    assert set(names(short_dir)) == left
    assert await living.do("echo", 1) == "y"
