"""A plugin that announces itself before it loads, as a built one does whose manifest is unchanged."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import psutil
import pytest

from engine_plugin.errors import PluginProcessError
from engine_plugin.goplugin.handshake import HostEnv, handshake_line
from engine_plugin.host import launch as launch_as_host
from engine_plugin.rpc.choice import use_grpcio
from tests.goplugin.hosting import ROOT, end_without_reader, environ, names
from tests.patience import LIMIT, within

if TYPE_CHECKING:
    from tests.goplugin.conftest import Launch

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no unix sockets"),
    pytest.mark.skipif(use_grpcio(), reason="grpcio cannot take over a socket"),
]


@pytest.mark.promise("G11", "G12", "G15", "G18")
@pytest.mark.parametrize("variables", [{}, {"PLUGIN_MULTIPLEX_GRPC": "true"}])
async def test_early_line_is_the_one_of_the_session(
    launch: Launch, short_dir: Path, variables: dict[str, str]
) -> None:
    plugin = await launch(TEST_EARLY="1", **variables)
    host = HostEnv.from_environ(environ(**variables))
    assert plugin.line.encode() + b"\n" == handshake_line(host, "unix", plugin.address)
    socket = Path(plugin.address)
    assert socket.parent.parent == short_dir
    assert [path.stat().st_mode & 0o077 for path in (socket, socket.parent)] == [0, 0]
    assert await plugin.do("echo", 1) == "y"
    await plugin.shutdown()
    assert await plugin.ended() == 0
    assert names(short_dir) == []


@pytest.mark.promise("G17")
async def test_early_call_waits_for_the_load(start: Launch) -> None:
    plugin = await (await start(TEST_EARLY="1", TEST_LOAD="stdin")).announced()
    calls = [asyncio.create_task(plugin.do("echo", size)) for size in (1, 2)]
    await plugin.logged("loading")
    assert not any(call.done() for call in calls)
    assert plugin.process.stdin is not None
    plugin.process.stdin.write(b"go on\n")
    assert await within(asyncio.gather(*calls)) == ["y", "yy"]


@pytest.mark.promise("G11", "G35")
@pytest.mark.parametrize(
    ("load", "said"), [("refuse", "Run: engine-plugin install"), ("crash", "the plugin crashed")]
)
async def test_failed_load_after_the_line_is_logged_and_ends_the_plugin(
    start: Launch, short_dir: Path, load: str, said: str
) -> None:
    """The host's call ends with the process, which logs the reason, exits with 1 and leaves nothing."""
    plugin = await (await start(TEST_EARLY="1", TEST_LOAD=load)).announced()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await plugin.do("echo", 1)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await plugin.ended() == 1
    assert (await plugin.logged(said))["@level"] == "error"
    assert plugin.plain == []
    assert names(short_dir) == []


@pytest.mark.promise("G35")
async def test_host_library_reports_why_an_announced_plugin_did_not_load(short_dir: Path) -> None:
    variables = environ(TEST_EARLY="1", TEST_LOAD="refuse", PLUGIN_UNIX_SOCKET_DIR=str(short_dir))
    command = [sys.executable, "-m", "tests.goplugin.plugin"]
    with pytest.raises(PluginProcessError, match=r"exited with code 1 .*Run: engine-plugin install"):
        await launch_as_host(command, cwd=ROOT, env=variables, start_timeout=LIMIT)


@pytest.mark.promise("G3", "G6", "G7", "G11")
@pytest.mark.parametrize(
    "variables",
    [
        {"ENGINE_PLUGIN_TRANSPORT": "tcp"},
        {"PLUGIN_UNIX_SOCKET_GROUP": str(os.getgid()) if sys.platform != "win32" else ""},
        {"PLUGIN_CLIENT_CERT": "-----BEGIN"},
        {"PLUGIN_PROTOCOL_VERSIONS": "3,2"},
        {"PLUGIN_UNIX_SOCKET_DIR": "/nonexistent"},
        {"ENGINE_PLUGIN_GRPC": "grpcio"},
    ],
)
async def test_unusual_host_gets_no_line_before_the_load(start: Launch, variables: dict[str, str]) -> None:
    plugin = await start(**({"TEST_EARLY": "1", "TEST_LOAD": "refuse"} | variables))
    assert await plugin.ended() == 1, "and nothing on stdout, which `ended` checks"


@pytest.mark.promise("G33", "G35")
@pytest.mark.parametrize("load", ["hang", "terminate", "stdin"])
async def test_signal_after_the_early_line_ends_the_plugin(start: Launch, short_dir: Path, load: str) -> None:
    plugin = await (await start(TEST_EARLY="1", TEST_LOAD=load)).announced()
    if load != "terminate":
        await plugin.logged("loading")
        plugin.process.send_signal(signal.SIGTERM)
    if load == "stdin":
        assert plugin.process.stdin is not None
        plugin.process.stdin.write(b"go on\n")
    assert await plugin.ended() == 0
    assert names(short_dir) == []


@pytest.mark.promise("G36")
async def test_plugin_whose_early_line_has_no_reader_leaves_nothing(short_dir: Path) -> None:
    assert await end_without_reader(short_dir, TEST_EARLY="1") == 0
    assert names(short_dir) == []


# It dies as soon as it has read the line.
DYING_HOST = """
import subprocess, sys
subprocess.Popen([sys.executable, "-m", "tests.goplugin.plugin"], stdout=subprocess.PIPE).stdout.readline()
"""


@pytest.mark.promise("G36")
async def test_death_of_the_host_just_after_the_early_line_is_noticed(short_dir: Path) -> None:
    variables = environ(TEST_EARLY="orphan", PLUGIN_UNIX_SOCKET_DIR=str(short_dir))
    nowhere, pipe = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
    host = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", DYING_HOST),
        stdin=nowhere,
        stderr=pipe,
        env=variables,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        _, log = await within(host.communicate())  # the log ends with the plugin
        assert b"the host has died" in log
        assert names(short_dir) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(host.pid, signal.SIGKILL)


@pytest.mark.promise("G34", "G36")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no event for output or for the host's end")
@pytest.mark.parametrize("early", ["", "1"])
async def test_plugin_has_one_thread_until_something_is_printed(launch: Launch, early: str) -> None:
    plugin = await launch(TEST_EARLY=early)
    await plugin.do("log", "a line")
    await plugin.logged("a line")
    assert psutil.Process(plugin.process.pid).num_threads() == 1
    output = asyncio.create_task(plugin.printed_until(b"printed"))
    await plugin.do("print", "printed")
    await within(output)
    assert psutil.Process(plugin.process.pid).num_threads() == 2
