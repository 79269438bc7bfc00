"""The plugin's TCP port answers processes of its own user only."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import pytest

from engine_plugin.protocol.stubs.goplugin import controller_pb2
from engine_plugin.protocol.stubs.standard import health_pb2
from engine_plugin.server import new_server, peers
from engine_plugin.server.peers import LocalPeers
from engine_plugin.server.seam import RpcService
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.promise("X5")
linux = pytest.mark.skipif(sys.platform != "linux", reason="the table of connections is Linux'")
STRANGER = 54321
CALLS = """\
import os, sys
import grpc
from google.protobuf.empty_pb2 import Empty
from engine_plugin.protocol.stubs.standard import health_pb2
from engine_plugin.protocol.stubs.standard import reflection_pb2
os.setuid(int(sys.argv[2]))
with grpc.insecure_channel(sys.argv[1]) as channel:
    ask = health_pb2.HealthCheckRequest.SerializeToString
    calls = {
        "shutdown": lambda: channel.unary_unary("/plugin.GRPCController/Shutdown")(b""),
        "health": lambda: channel.unary_unary("/grpc.health.v1.Health/Check")(b""),
        "watch": lambda: next(channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")),
        "reflection": lambda: next(
            channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(
                iter([reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()])
            )
        ),
    }
    for name, call in calls.items():
        try:
            call()
            print(name, "OK")
        except grpc.RpcError as error:
            print(name, error.code().name)
"""


class Controller:
    """Counts the calls of Shutdown."""

    def __init__(self) -> None:
        self.calls = 0

    async def Shutdown(self, _request: object, _call: object) -> controller_pb2.Empty:  # noqa: N802  # the rpc's name
        self.calls += 1
        return controller_pb2.Empty()


@asynccontextmanager
async def served(controller: Controller, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    server = new_server()
    service = RpcService(controller_pb2.DESCRIPTOR.services_by_name["GRPCController"], controller)
    server.add(service)
    bound = await server.start(address)
    try:
        yield bound
    finally:
        await server.stop(0)


async def called_as(uid: int, address: str) -> dict[str, str]:
    """Return the outcome of each call from a process of that user."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CALLS, address, str(uid), stdout=subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), LIMIT)
    return dict(line.split() for line in output.decode().splitlines())


@linux
@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_gets_no_answer_from_any_service(caplog: pytest.LogCaptureFixture) -> None:
    controller = Controller()
    async with served(controller) as address:
        assert set((await called_as(STRANGER, address)).values()) == {"PERMISSION_DENIED"}
        assert controller.calls == 0
        assert await called_as(os.geteuid(), address) == dict.fromkeys(
            ("shutdown", "health", "watch", "reflection"), "OK"
        )
        assert controller.calls == 1
    assert "refused: the connection does not belong to this user" in caplog.text


@linux
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
async def test_connection_is_found_in_the_table(host: str) -> None:
    try:
        listener = socket.create_server(
            (host.strip("[]"), 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError:
        pytest.skip("no IPv6 here")
    with listener:
        port = listener.getsockname()[1]
        local = LocalPeers(port)
        with socket.create_connection(listener.getsockname()[:2]) as client:
            peer = f"ipv{6 if ':' in host else 4}:{host.replace('[', '%5B').replace(']', '%5D')}"
            peer += f":{client.getsockname()[1]}"
            assert await local.admits(peer)
            assert await local.admits(peer), "the second time it is known"
        assert not await LocalPeers(port).admits(peer), "a closed socket has no owner"
        assert not await local.admits("ipv4:192.0.2.1:80")
        assert not await local.admits("unix:")


@linux
async def test_connection_of_another_user_is_read_from_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of the kernel's: a client of uid 1000, one that was closed (as root's), and IPv4 mapped in IPv6."""
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    rest = "00000000:00000000 00:00000000 00000000"
    four, six = tmp_path / "tcp", tmp_path / "tcp6"
    four.write_text(
        f"{head}   0: 0100007F:2710 0100007F:1F90 01 {rest}  1000        0 4711 1 0 20 4 30 10 -1\n"
        f"   1: 0100007F:2711 0100007F:1F90 06 {rest}     0        0 0 3 0\n"
    )
    mapped = "0000000000000000FFFF00000100007F"
    six.write_text(
        f"{head}   0: {mapped}:2712 {mapped}:1F90 01 {rest}  {os.getuid()}        0 4712 1 0 20 4 30 10 -1\n"
    )
    monkeypatch.setattr(peers, "_TABLES", (four, six))
    local = LocalPeers(8080)
    if os.getuid() != 1000:
        assert not await local.admits("ipv4:127.0.0.1:10000")
    assert not await local.admits("ipv4:127.0.0.1:10001")
    assert await local.admits("ipv4:127.0.0.1:10002")
    assert not await LocalPeers(8081).admits("ipv4:127.0.0.1:10002"), "a connection to another port"


async def test_all_users_are_admitted_with_a_warning_where_the_system_has_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peers, "_TABLES", (tmp_path / "tcp",))
    monkeypatch.setattr(sys, "platform", "linux")
    controller = Controller()
    with caplog.at_level(logging.WARNING):
        async with served(controller) as address, grpc.aio.insecure_channel(address) as channel:
            shutdown: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                "/plugin.GRPCController/Shutdown"
            )
            for _ in range(2):
                await shutdown(b"")
    assert controller.calls == 2
    [warning] = [
        record.getMessage() for record in caplog.records if "every user of this machine" in record.getMessage()
    ]
    assert address.rpartition(":")[2] in warning
    assert "Use unix sockets, or AutoMTLS" in warning


async def test_unix_socket_connection_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalPeers, "admits", None)
    if sys.platform != "win32":
        async with (
            served(Controller(), f"unix:{tmp_path}/s") as address,
            grpc.aio.insecure_channel(address) as channel,
        ):
            check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                "/grpc.health.v1.Health/Check"
            )
            answer = health_pb2.HealthCheckResponse.FromString(await check(b""))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
