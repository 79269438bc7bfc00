"""A plugin under a host with AutoMTLS."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import psutil
import pytest

from engine_plugin.errors import EnginePluginError
from engine_plugin.goplugin.handshake import HostEnv
from engine_plugin.goplugin.listen import listening
from engine_plugin.goplugin.relay import RelayingTlsServer
from engine_plugin.goplugin.tls import TlsServer, host_certificates
from engine_plugin.rpc.choice import use_grpcio
from engine_plugin.system.certificates import Identity
from tests.goplugin.test_listen import gid, healthy, host, mode, names, taken_port
from tests.goplugin.test_serve import end_in_time
from tests.goplugin.tls_client import SETTINGS, TlsClient, client_context, host_identity
from tests.patience import LIMIT, within

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.goplugin.conftest import Launch

posix = pytest.mark.skipif(sys.platform == "win32", reason="unix sockets are for POSIX")
TRANSPORTS = [pytest.param("unix", marks=posix), "tcp"]
PORTS = {"PLUGIN_MIN_PORT": "20000", "PLUGIN_MAX_PORT": "25000"}


@pytest.mark.promise("G7", "G12", "G13", "G17", "G20", "G34", "G35", "G39")
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_plugin_with_tls_serves_and_exits_cleanly(launch: Launch, short_dir: Path, transport: str) -> None:
    """The plugin announces its certificate, answers messages of any size, and leaves nothing after Shutdown."""
    warnings = "always::ResourceWarning"
    plugin = await launch(tls=True, ENGINE_PLUGIN_TRANSPORT=transport, PYTHONWARNINGS=warnings, **PORTS)
    assert plugin.line.startswith(f"1|1|{transport}|{plugin.address}|grpc|MII")
    assert len(plugin.line.split("|")) == 6
    assert len(plugin.line.split("|")[5]) > 50  # what is shorter, a host does not read
    size = 6 << 20
    assert len(await plugin.do("echo", size, padding="x" * size)) == size
    assert await end_in_time(plugin) == 0
    assert [line["@message"] for line in plugin.log] == ["stopping: the host asked", "closed"]
    assert plugin.plain == []
    assert names(short_dir) == []


@pytest.mark.promise("G8", "G15")
async def test_multiplexing_is_declined_after_the_certificate(launch: Launch) -> None:
    fields = (await launch(tls=True, PLUGIN_MULTIPLEX_GRPC="true")).line.split("|")
    assert fields[5].startswith("MII")
    assert fields[6:] == ["false"]


@pytest.mark.promise("G14")
@pytest.mark.parametrize("asked", [{}, {"PLUGIN_CLIENT_CERT": ""}])
async def test_host_without_auto_mtls_gets_no_certificate(launch: Launch, asked: dict[str, str]) -> None:
    plugin = await launch(**asked)
    assert plugin.line.split("|")[5:] == [""]
    assert await plugin.do("echo", 1) == "y"


@pytest.mark.promise("G20", "G21", "G22", "G34")
async def test_streams_held_over_tls_do_not_delay_the_exit(launch: Launch) -> None:
    """The output before the exit still arrives."""
    plugin = await launch(tls=True)
    output = asyncio.create_task(plugin.printed_until(b"never"))
    working = asyncio.create_task(plugin.do("wait"))
    await plugin.do("print", "goodbye")
    assert await end_in_time(plugin) == 0
    assert (await within(output)).split() == [b"goodbye"]
    with pytest.raises(grpc.aio.AioRpcError):
        await within(working)


@pytest.mark.promise("G34")
@pytest.mark.parametrize("aclose", ["hang", "block"])
async def test_engine_that_does_not_stop_under_tls_is_left(launch: Launch, short_dir: Path, aclose: str) -> None:
    plugin = await launch(tls=True, TEST_ACLOSE=aclose)
    assert await end_in_time(plugin) == (aclose == "block")
    assert names(short_dir) == []


@posix
@pytest.mark.promise("G18")
async def test_directories_of_a_killed_plugin_with_tls_are_removed_by_the_next(
    launch: Launch, short_dir: Path
) -> None:
    """A plugin with TLS has two socket directories with grpcio, whose server listens behind TLS, too."""
    killed = await launch(tls=True)
    assert len(names(short_dir)) == (2 if use_grpcio() else 1)
    for name in names(short_dir):
        os.utime(short_dir / name, (0, 0))
    killed.process.kill()
    await killed.ended()
    living = await launch()
    assert names(short_dir) == [Path(living.address).parent.name]


class Served:
    """A server behind TLS, in this process, with gRPC's own health service only."""

    def __init__(self, *, loopback: bool = False, base: str = "") -> None:
        self.host = host_identity()
        trusted = host_certificates(self.host.certificate_pem.decode())
        relaying = use_grpcio() or loopback
        self.server = RelayingTlsServer(trusted, base, loopback=loopback) if relaying else TlsServer(trusted)
        self.context = client_context(self.host, self.server.certificate)

    async def greet(self, address: str, identity: Identity | None = None) -> int:
        context = client_context(identity, self.server.certificate) if identity else self.context
        async with await TlsClient.connect(address, context) as client:
            return await client.greet()


@pytest.fixture
async def served(short_dir: Path) -> AsyncIterator[Served]:
    served = Served(base=str(short_dir))
    try:
        yield served
    finally:
        await within(served.server.stop(0))
        assert names(short_dir) == []


@posix
@pytest.mark.promise("G5", "G18")
async def test_announced_and_inner_socket_are_private(served: Served, short_dir: Path) -> None:
    async with listening(served.server, host(PLUGIN_UNIX_SOCKET_DIR=str(short_dir))) as (network, address):
        assert network == "unix"
        assert len(names(short_dir)) == (2 if use_grpcio() else 1)
        for name in names(short_dir):
            assert mode(short_dir / name) == 0o700
            assert names(short_dir / name) == ["sock"]  # and no key
        assert mode(Path(address)) == 0o600
        assert await served.greet(f"unix:{address}") == SETTINGS


@posix
@pytest.mark.promise("G6")
async def test_socket_group_may_connect_to_the_tls_socket_only(served: Served, short_dir: Path) -> None:
    """The announced socket is the group's; the plaintext behind it stays ours."""
    ours = os.getgid()
    environment = host(PLUGIN_UNIX_SOCKET_DIR=str(short_dir), PLUGIN_UNIX_SOCKET_GROUP=str(ours))
    async with listening(served.server, environment) as (_, address):
        announced = Path(address)
        assert (mode(announced), gid(announced)) == (0o660, ours)
        assert mode(announced.parent) == 0o750
        inside = set(names(short_dir)) - {announced.parent.name}
        assert len(inside) == (1 if use_grpcio() else 0)
        assert all(mode(short_dir / name) == 0o700 for name in inside)
        assert await served.greet(f"unix:{address}") == SETTINGS


CONNECT = """
import os, socket, sys
os.setgroups([])
os.setgid(int(sys.argv[2]))
os.setuid(54321)
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[1])
    print("connected")
except PermissionError:
    print("kept out")
"""


def open_to_all(directory: Path) -> None:
    directory.chmod(0o755)


@posix
@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="only root may give a socket to a group that is not its own"
)
@pytest.mark.promise("G6")
@pytest.mark.parametrize("tls", [False, True])
async def test_another_user_of_the_group_connects(served: Served, short_dir: Path, tls: bool) -> None:
    from engine_plugin.server import new_server

    open_to_all(short_dir)
    server = served.server if tls else new_server()
    environment = host(PLUGIN_UNIX_SOCKET_DIR=str(short_dir), PLUGIN_UNIX_SOCKET_GROUP="54321")
    try:
        async with listening(server, environment) as (_, address):
            inside = [str(short_dir / name / "sock") for name in names(short_dir) if name not in address]
            assert len(inside) == (tls and use_grpcio())
            for group, path, outcome in [
                (54321, address, "connected"),
                (54322, address, "kept out"),
                *((54321, path, "kept out") for path in inside),
            ]:
                done = await asyncio.to_thread(
                    subprocess.run,
                    [sys.executable, "-I", "-c", CONNECT, path, str(group)],
                    capture_output=True,
                    text=True,
                    timeout=LIMIT,
                )
                assert done.stdout == f"{outcome}\n", done.stderr
    finally:
        await server.stop(0)


@pytest.mark.promise("G3", "G4")
async def test_taken_port_in_the_range_is_skipped_with_tls(served: Served) -> None:
    """A second server of this package skips it too."""
    listener, port = taken_port()
    if port > 65533:
        pytest.skip("the system gave the last port of all")
    environment = host("tcp", PLUGIN_MIN_PORT=str(port), PLUGIN_MAX_PORT=str(port + 20))
    second = Served()
    try:
        async with listening(served.server, environment) as (network, address):
            assert network == "tcp"
            assert await served.greet(address) == SETTINGS
            async with listening(second.server, environment) as (_, another):
                assert await second.greet(another) == SETTINGS
        ports = [int(text.removeprefix("127.0.0.1:")) for text in (address, another)]
        assert port < ports[0] < ports[1] <= port + 20
    finally:
        listener.close()
        await second.server.stop(0)


@pytest.mark.promise("G3")
async def test_range_of_one_port_works_with_tls(served: Served) -> None:
    listener, port = taken_port()
    environment = host("tcp", PLUGIN_MIN_PORT=str(port), PLUGIN_MAX_PORT=str(port))
    try:
        with pytest.raises(EnginePluginError, match=f"no port from {port} to {port} is free"):
            async with listening(served.server, environment):
                pytest.fail("it listens")
    finally:
        listener.close()
    async with listening(served.server, environment) as (_, address):
        assert address == f"127.0.0.1:{port}"
        assert await served.greet(address) == SETTINGS


def listening_ports() -> set[int]:
    connections = psutil.Process().net_connections("tcp")
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


@pytest.mark.promise("G7", "G39")
async def test_inner_tcp_port_requires_the_key_of_this_process() -> None:
    """As on Windows: a client of the port behind TLS needs a key that only this process has."""
    before = listening_ports()
    served = Served(loopback=True)
    try:
        address = await served.server.start("127.0.0.1:0")
        [inner] = {f"127.0.0.1:{port}" for port in listening_ports() - before} - {address}
        assert await served.greet(address) == SETTINGS
        with pytest.raises(grpc.aio.AioRpcError):
            await healthy(inner)
        for stranger in (None, served.host, Identity.create()):
            async with await TlsClient.connect(inner, client_context(stranger, served.server.certificate)) as client:
                with pytest.raises((ssl.SSLError, OSError)):
                    await client.greet()
    finally:
        await within(served.server.stop(0))
    assert listening_ports() <= before


@posix
async def test_unusable_socket_directory_is_reported_as_such(short_dir: Path) -> None:
    """The error is not taken for a port that is in use."""
    for base, said in (("none", "PLUGIN_UNIX_SOCKET_DIR"), ("x" * 90, "the system allows")):
        (short_dir / ("x" * 90)).mkdir(exist_ok=True)
        identity = host_identity()
        trusted = host_certificates(identity.certificate_pem.decode())
        server = RelayingTlsServer(trusted, str(short_dir / base), loopback=False)
        try:
            with pytest.raises(EnginePluginError, match=said):
                await server.start("127.0.0.1:0")
        finally:
            await server.stop(0)


@pytest.mark.promise("G34")
async def test_stop_ends_all_connections(served: Served) -> None:
    """Both a host that stays connected and a silent client; new connections are refused."""
    address = await served.server.start("127.0.0.1:0")
    async with (
        await TlsClient.connect(address, served.context) as client,
        await TlsClient.connect(address, served.context) as silent,
    ):
        assert await client.greet() == SETTINGS
        await within(served.server.stop(0.3))
        await silent.hung_up()
        await client.hung_up()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=LIMIT).close()


@pytest.mark.promise("G7")
def test_unreadable_client_certificate_is_a_host_error() -> None:
    with pytest.raises(EnginePluginError, match=r"PLUGIN_CLIENT_CERT.*set AutoMTLS to false"):
        host_certificates("no certificate")


@pytest.mark.promise("G13")
@pytest.mark.parametrize("size", [60, 61, 62])
def test_announced_certificate_has_no_base64_padding(size: int) -> None:
    from engine_plugin.goplugin.handshake import handshake_line

    asked = HostEnv.from_environ({"PLUGIN_CLIENT_CERT": "PEM"}, windows=False)
    field = handshake_line(asked, "unix", "/x", b"\xff" * size).decode().strip().split("|")[5]
    assert field == "/" * (size * 8 // 6) + {0: "", 1: "w", 2: "8"}[size % 3]
