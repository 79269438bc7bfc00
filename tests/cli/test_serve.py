"""`engine-plugin serve`."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import socket
import stat
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest

from engine_plugin.host import connect
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Workplace

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sockets and signals of POSIX")


@pytest.fixture(autouse=True)
def _commands_run_apart(workplace: Workplace) -> None:
    """`serve` takes the signals of its process, and some tests have a loop of their own."""
    workplace.apart = True


@contextmanager
def serving(
    workplace: Workplace, *arguments: str, stop: signal.Signals = signal.SIGTERM, env: dict[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """`serve --json` until the block ends; it must then end well."""
    server = workplace.start("serve", "--json", *arguments, **(env or {}))
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        assert line, server.communicate(timeout=LIMIT)
        yield json.loads(line)
        server.send_signal(stop)
        _out, said = server.communicate(timeout=LIMIT)
        assert server.returncode == 0, said
        assert "Traceback" not in said
    finally:
        server.kill()
        server.communicate()


async def start_engine(address: str) -> None:
    async with await connect(address) as plugin:
        assert (await plugin.get_manifest())["provider"]["name"] == "fake-plugin"
        await plugin.start_engine()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_default_address_is_a_private_socket(workplace: Workplace, number: signal.Signals) -> None:
    workplace.good("engine", "install")
    with serving(workplace, stop=number) as said:
        path = Path(said["address"].removeprefix("unix:"))
        assert path.is_relative_to(workplace.runtime)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        assert said["grpcurl"] == f"grpcurl -plaintext unix://{path} protocol.ProviderService/GetManifest"
        asyncio.run(start_engine(said["address"]))
        assert "already" in workplace.bad(4, "serve")
        assert workplace.good("engine", "status").splitlines()[0] == "plugin:  fake-plugin"
    assert workplace.journal == ["start auto", "stop"]
    assert not path.exists()


async def test_given_addresses_are_served(workplace: Workplace) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    unix = f"unix:{workplace.runtime}/by-hand.sock"
    with (
        serving(workplace, "--address", f"127.0.0.1:{port}") as tcp,
        serving(workplace, "--address", unix) as by_hand,
    ):
        assert tcp["address"] == f"127.0.0.1:{port}"
        assert tcp["grpcurl"].startswith(f"grpcurl -plaintext 127.0.0.1:{port} ")
        for address in (tcp["address"], by_hand["address"]):
            async with await connect(address) as plugin:
                assert await plugin.get_version() == "1.0"
        assert "not running" in workplace.bad(4, "models", "ps")  # only the default address is known
        for taken in (unix, f"127.0.0.1:{port}"):
            said = workplace.bad(4, "serve", "--address", taken)
            assert said == f"engine-plugin: {taken}: address already in use. Choose another --address\n"


@pytest.mark.promise("L3")
@pytest.mark.parametrize("relative", [False, True])
async def test_suggested_command_reaches_the_socket(workplace: Workplace, relative: bool) -> None:
    folder = workplace.plugin if relative else workplace.runtime
    path = folder / "C# a?b %41"
    with serving(workplace, "--address", f"unix:{path.name if relative else path}") as said:
        assert said["address"] == f"unix:{path}"
        program, flag, target, method = shlex.split(said["grpcurl"])
        assert (program, flag) == ("grpcurl", "-plaintext")
        async with grpc.aio.insecure_channel(target) as channel:
            call: Any = channel.unary_unary(f"/{method}")
            answer = await call(b"", timeout=30)
        assert b"fake-plugin" in answer


@pytest.mark.promise("L9")
def test_unavailable_address_is_rejected_with_the_reason(workplace: Workplace) -> None:
    long = f"unix:{workplace.runtime}/{'x' * 100}"
    said = workplace.bad(4, "serve", "--address", long)
    assert f"the socket path has {len(long) - 5} bytes; the limit of the system is" in said
    nowhere = workplace.runtime / "no such" / "sock"
    said = workplace.bad(4, "serve", "--address", f"unix:{nowhere}")
    assert f"Create it: mkdir -p -m 700 '{nowhere.parent}'" in said
    for wrong in ("unix:", "127.0.0.1:99999", "127.0.0.1", "localhost:http"):
        assert f"--address {wrong}: must be" in workplace.bad(2, "serve", "--address", wrong)
    said = workplace.bad(4, "serve", "--address", "203.0.113.1:5000", "--allow-remote")
    assert "203.0.113.1:5000: " in said
    assert said.endswith(". Choose another --address\n")


@pytest.mark.promise("P10")
@pytest.mark.parametrize("address", ["0.0.0.0:5000", "[::]:5000", "192.0.2.1:5000", "example.org:5000", ":5000"])
def test_address_for_other_machines_needs_allow_remote(workplace: Workplace, address: str) -> None:
    workplace.apart = False  # nothing is served
    assert "--allow-remote" in workplace.bad(2, "serve", "--address", address)


def test_allow_remote_serves_other_machines(workplace: Workplace) -> None:
    with serving(workplace, "--address", "0.0.0.0:0", "--allow-remote") as said:
        assert not said["address"].endswith(":0")


def test_text_output_names_the_address(workplace: Workplace) -> None:
    server = workplace.start("serve")
    assert server.stdout is not None
    try:
        assert server.stdout.readline().startswith("serving fake-plugin at unix:")
        assert server.stdout.readline().startswith("try: grpcurl -plaintext unix://")
        server.terminate()
        assert "stopping the engine" in server.communicate(timeout=LIMIT)[1]
        assert server.returncode == 0
    finally:
        server.kill()
        server.communicate()


@pytest.mark.promise("P10")
def test_runtime_directory_open_to_others_is_not_used(workplace: Workplace) -> None:
    (workplace.runtime / "engine-plugin").mkdir(mode=0o755)
    (workplace.runtime / "engine-plugin").chmod(0o755)
    temporary = workplace.runtime / "tmp"
    temporary.mkdir()
    workplace.env["TMPDIR"] = str(temporary)
    with serving(workplace, env={"AOG_DATA_DIR": str(workplace.home / ("long" * 25))}) as record:
        path = Path(record["address"].removeprefix("unix:"))
        assert path.parent.parent == temporary
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(temporary.iterdir()) == []
    data = workplace.runtime / "aog"
    workplace.env["AOG_DATA_DIR"] = str(data)
    with serving(workplace, "--plugin", str(workplace.plugin)) as record:
        assert record["address"].startswith(f"unix:{data}/engines/fake/run/")
        assert workplace.run("engine", "status").returncode == 4  # found there, too: served, not started
        assert "stopped" in workplace.run("engine", "status").stdout


@pytest.mark.skipif(
    Path(f"/run/user/{os.getuid() if hasattr(os, 'getuid') else 0}").exists(),
    reason="a session's directory that is not the test's",
)
def test_session_without_a_runtime_directory_finds_the_server(workplace: Workplace) -> None:
    """As in a service or a bare `su`: the same rule finds the directory again, without a prompt or warning."""
    data = workplace.runtime / "aog"
    del workplace.env["XDG_RUNTIME_DIR"]
    workplace.env |= {"AOG_DATA_DIR": str(data), "TMPDIR": str(workplace.runtime)}
    with serving(workplace) as record:
        done = workplace.run("engine", "status", "--json")
        assert json.loads(done.stdout)["address"] == record["address"]
        assert done.stderr == ""


@pytest.mark.promise("L2", "X14")
@pytest.mark.skipif(
    Path(f"/run/user/{os.getuid() if hasattr(os, 'getuid') else 0}").exists(),
    reason="a session's directory that is not the test's",
)
def test_server_keeps_its_files_out_of_shared_directories(workplace: Workplace) -> None:
    """Without a runtime directory no foreseeable name in /tmp is used, nor another user's directory."""
    temporary = workplace.runtime / "tmp"
    temporary.mkdir()
    workplace.env |= {"AOG_DATA_DIR": str(workplace.runtime / "aog"), "TMPDIR": str(temporary)}
    for environ in ({"XDG_RUNTIME_DIR": ""}, {"XDG_RUNTIME_DIR": str(temporary / "theirs")}):
        if os.getuid() == 0 and environ["XDG_RUNTIME_DIR"]:
            (temporary / "theirs").mkdir(mode=0o700)
            os.chown(temporary / "theirs", 12345, -1)
        before = sorted(temporary.rglob("*"))
        with serving(workplace, env=environ) as record:
            assert record["address"].startswith(f"unix:{workplace.runtime}/aog/")
            assert sorted(temporary.rglob("*")) == before


@pytest.mark.promise("P11")
def test_file_at_the_socket_path_is_not_removed(workplace: Workplace) -> None:
    file = workplace.runtime / "precious"
    file.write_text("data")
    assert "path exists and is not a socket" in workplace.bad(4, "serve", "--address", f"unix:{file}")
    assert file.read_text() == "data"
