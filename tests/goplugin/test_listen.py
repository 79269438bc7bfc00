from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import grpc
import grpc.aio
import pytest

from engine_plugin.errors import EnginePluginError
from engine_plugin.goplugin.handshake import HostEnv
from engine_plugin.goplugin.listen import listening
from engine_plugin.server import new_server
from tests.goplugin.hosting import ROOT, environ
from tests.patience import LIMIT, within

if TYPE_CHECKING:
    from collections.abc import Iterator

unix = pytest.mark.skipif(sys.platform == "win32", reason="unix sockets are for POSIX")


def host(transport: str = "unix", **changes: str) -> HostEnv:
    return HostEnv.from_environ({"ENGINE_PLUGIN_TRANSPORT": transport} | changes)


async def healthy(target: str) -> bool:
    """The health check that a host makes."""
    from engine_plugin.protocol.stubs.standard import health_pb2

    async with grpc.aio.insecure_channel(target) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = await check(health_pb2.HealthCheckRequest(service="plugin"), timeout=LIMIT)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def gid(path: Path) -> int:
    return path.stat().st_gid


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.promise("G5", "G18", "G19")
@unix
@pytest.mark.parametrize("name", ["plain", "with space", "50%41 # ? ü"])
async def test_socket_is_private_and_removed_on_close(short_dir: Path, name: str) -> None:
    """It lies in the host's directory, and only this user can enter it."""
    base = short_dir / name
    base.mkdir()
    server = new_server()
    async with listening(server, host(PLUGIN_UNIX_SOCKET_DIR=str(base))) as (network, address):
        path = Path(address)
        assert (network, path.parent.parent) == ("unix", base)
        assert mode(path.parent) == 0o700
        assert await healthy("unix:" + quote(address))
        await server.stop(0)
    assert names(base) == []


@pytest.mark.promise("G5")
@unix
async def test_socket_defaults_to_the_temporary_directory(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short_dir))
    server = new_server()
    async with listening(server, host(PLUGIN_UNIX_SOCKET_DIR="")) as (_, address):
        assert Path(address).parent.parent == short_dir
        await server.stop(0)


@pytest.mark.promise("G6")
@unix
@pytest.mark.parametrize("by_name", [True, False])
async def test_socket_group_may_connect(short_dir: Path, by_name: bool) -> None:
    import grp

    ours = os.getgid()
    called = {entry.gr_gid: entry.gr_name for entry in grp.getgrall()}
    if by_name and ours not in called:
        pytest.skip("this user's group has no name")
    group = called[ours] if by_name else str(ours)
    variables = {"PLUGIN_UNIX_SOCKET_DIR": str(short_dir), "PLUGIN_UNIX_SOCKET_GROUP": group}
    server = new_server()
    async with listening(server, host(**variables)) as (_, address):
        path = Path(address)
        assert (mode(path), gid(path)) == (0o660, ours)
        assert (mode(path.parent), gid(path.parent)) == (0o750, ours)
        await server.stop(0)
    assert names(short_dir) == []


async def refusal(environment: HostEnv) -> str:
    server = new_server()
    try:
        async with listening(server, environment):
            pytest.fail("it listens")
    except EnginePluginError as error:
        return str(error)
    finally:
        await server.stop(0)


@pytest.mark.promise("G6")
@unix
@pytest.mark.parametrize("group", ["no-such-group-here", "99999999999999999999"])
async def test_unknown_socket_group_is_an_error(short_dir: Path, group: str) -> None:
    variables = {"PLUGIN_UNIX_SOCKET_DIR": str(short_dir), "PLUGIN_UNIX_SOCKET_GROUP": group}
    assert "PLUGIN_UNIX_SOCKET_GROUP" in await refusal(host(**variables))
    assert names(short_dir) == []


@pytest.mark.promise("G6")
@unix
@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may give to any group")
async def test_socket_group_without_the_user_is_an_error(short_dir: Path) -> None:
    variables = {"PLUGIN_UNIX_SOCKET_DIR": str(short_dir), "PLUGIN_UNIX_SOCKET_GROUP": "0"}
    assert "must be a member" in await refusal(host(**variables))
    assert names(short_dir) == []


@pytest.mark.promise("G18")
@unix
@pytest.mark.parametrize(
    ("name", "said"), [("x" * 90, "the system allows"), ("a|b", "handshake line"), ("a\nb", "handshake line")]
)
async def test_socket_path_unfit_for_the_handshake_line_is_rejected(short_dir: Path, name: str, said: str) -> None:
    base = short_dir / name
    base.mkdir()
    message = await refusal(host(PLUGIN_UNIX_SOCKET_DIR=str(base)))
    assert said in message
    assert "Set PLUGIN_UNIX_SOCKET_DIR to" in message
    assert names(base) == []


@pytest.mark.promise("G18")
@unix
async def test_longest_socket_path_works(short_dir: Path) -> None:
    """107 bytes (103 on macOS)."""
    limit = 103 if sys.platform == "darwin" else 107
    below = len("/engine-plugin-12345678/sock")
    base = short_dir / ("x" * (limit - below - len(str(short_dir)) - 1))
    base.mkdir()
    server = new_server()
    async with listening(server, host(PLUGIN_UNIX_SOCKET_DIR=str(base))) as (_, address):
        assert len(address) == limit
        assert await healthy(f"unix:{address}")
        await server.stop(0)


@unix
async def test_missing_socket_directory_is_an_error(short_dir: Path) -> None:
    message = await refusal(host(PLUGIN_UNIX_SOCKET_DIR=str(short_dir / "none")))
    assert "Set PLUGIN_UNIX_SOCKET_DIR to" in message


OWNER = """
import sys
from engine_plugin.system.socketdir import private_directory
with private_directory(sys.argv[1], "") as directory:
    (directory / "sock").touch()
    print(directory, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner(short_dir: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that holds a socket directory, and that directory, made a minute ago."""
    command = [sys.executable, "-c", OWNER, str(short_dir)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environ(), cwd=ROOT) as process:
        assert process.stdout is not None
        directory = Path(process.stdout.readline().strip())
        age(directory)
        try:
            yield process, directory
        finally:
            process.kill()


def age(directory: Path) -> None:
    then = time.time() - 60
    os.utime(directory, (then, then))


@pytest.mark.promise("G18")
@unix
def test_socket_directory_of_a_killed_plugin_is_removed(
    owner: tuple[subprocess.Popen[str], Path], short_dir: Path
) -> None:
    """It is kept while its owner lives."""
    from engine_plugin.system.socketdir import private_directory, remove_stale

    process, directory = owner
    assert remove_stale(short_dir) == 0
    process.kill()
    process.wait(LIMIT)
    assert directory.is_dir()
    with private_directory(str(short_dir), "") as ours:
        assert names(short_dir) == [ours.name]


@unix
def test_socket_directory_is_removed_when_its_owner_ends(
    owner: tuple[subprocess.Popen[str], Path], short_dir: Path
) -> None:
    process, directory = owner
    assert directory.is_dir()
    process.communicate(timeout=LIMIT)
    assert names(short_dir) == []


@unix
def test_directory_that_may_belong_to_another_is_kept(short_dir: Path) -> None:
    import fcntl

    from engine_plugin.system.socketdir import remove_stale

    made = ["other-1", "engine-plugin-new", "engine-plugin-data", "engine-plugin-locked", "engine-plugin-theirs"]
    for name in made:
        (short_dir / name).mkdir()
        (short_dir / name / "sock").touch()
    (short_dir / "engine-plugin-data" / "model.gguf").touch()
    lock = os.open(short_dir / "engine-plugin-locked", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    (short_dir / "engine-plugin-link").symlink_to(short_dir / "other-1")
    (short_dir / "engine-plugin-file").touch()
    for name in set(made) - {"engine-plugin-new"}:
        age(short_dir / name)
    if sys.platform != "win32" and os.geteuid() == 0:
        os.chown(short_dir / "engine-plugin-theirs", 12345, -1)
    else:
        (short_dir / "engine-plugin-theirs").chmod(0)
    try:
        before = names(short_dir)
        assert remove_stale(short_dir) == 0
        assert remove_stale(short_dir / "none") == 0
        assert names(short_dir) == before
    finally:
        os.close(lock)
        (short_dir / "engine-plugin-theirs").chmod(0o700)


def taken_port() -> tuple[socket.socket, int]:
    """A listening port whose next one is free, most likely."""
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, listener.getsockname()[1]


@pytest.mark.promise("G3", "G4")
async def test_taken_port_in_the_range_is_skipped() -> None:
    """A second server of this package skips it too."""
    listener, port = taken_port()
    if port > 65533:
        pytest.skip("the system gave the last port of all")
    servers = [new_server(), new_server()]
    environment = host("tcp", PLUGIN_MIN_PORT=str(port), PLUGIN_MAX_PORT=str(port + 20))
    try:
        addresses = []
        for server in servers:
            async with listening(server, environment) as (network, address):
                assert network == "tcp"
                assert await healthy(address)
                addresses.append(address)
        ports = [int(address.removeprefix("127.0.0.1:")) for address in addresses]
        assert port < ports[0] < ports[1] <= port + 20
    finally:
        listener.close()
        await within(asyncio.gather(*(server.stop(0) for server in servers)))


@pytest.mark.promise("G3")
async def test_range_of_one_port_works() -> None:
    listener, port = taken_port()
    environment = host("tcp", PLUGIN_MIN_PORT=str(port), PLUGIN_MAX_PORT=str(port))
    try:
        assert f"no port from {port} to {port} is free" in await refusal(environment)
    finally:
        listener.close()
    server = new_server()
    async with listening(server, environment) as (_, address):
        assert address == f"127.0.0.1:{port}"
        await server.stop(0)


@pytest.mark.promise("G3")
async def test_free_port_is_used_without_a_range() -> None:
    server = new_server()
    async with listening(server, host("tcp")) as (_, address):
        assert await healthy(address)
        await server.stop(0)
