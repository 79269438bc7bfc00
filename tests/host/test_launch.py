"""A plugin is launched, or the error says why not; no process is ever left."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from engine_plugin.errors import PluginProcessError, UnavailableError
from engine_plugin.host import LogLine, PluginClient, connect, launch
from tests.patience import LIMIT, pace, within

from .conftest import FAKE_PLUGIN, Launch

if TYPE_CHECKING:
    from pathlib import Path


def no_children() -> bool:
    return not [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


async def test_plugin_is_launched_as_aog_does(launch_fake: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUGIN_CLIENT_CERT", "that of the host above us")
    monkeypatch.delenv("AOG_VERSION", raising=False)
    async with await launch_fake() as plugin:
        answer = await plugin.invoke("echo", {})
        assert plugin.pid == answer["pid"]
        assert plugin.returncode is None
        env = answer["env"]
        assert {name: value for name, value in env.items() if name.startswith("PLUGIN_")} == {
            "PLUGIN_PROTOCOL_VERSIONS": "1",
            "PLUGIN_MIN_PORT": "10000",
            "PLUGIN_MAX_PORT": "25000",
        }
        assert env["AOG_PLUGIN"] == "aog-provider-plugin-v1"
        assert "AOG_VERSION" not in env
        assert env["PATH"] == os.environ["PATH"]
        assert answer["argv"] == []
    assert plugin.returncode == 0
    assert no_children()


async def test_output_of_a_plugin_is_logged(launch_fake: Launch) -> None:
    lines: list[LogLine] = []
    last = asyncio.Event()

    def on_log(line: LogLine) -> None:
        lines.append(line)
        if {"over stdio", "a line after the handshake", "plain words"} <= {line.message for line in lines}:
            last.set()
            raise RuntimeError("an on_log that fails stops nothing")

    async with await launch_fake(on_log=on_log) as plugin:
        await asyncio.wait_for(last.wait(), LIMIT)
        await plugin.get_version()
    serving = next(line for line in lines if line.message == "serving")
    assert serving.level == "debug"
    assert serving.kv == {"address": plugin.address, "big": 2**40}


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("noise", "not a go-plugin handshake: 'Loading the model...'. A plugin must print the handshake line first"),
        ("core", "go-plugin core protocol mismatch: expected version 1, got 2"),
        ("version", "provider protocol mismatch: expected version 1, got 7"),
        ("netrpc", "protocol mismatch: expected 'grpc', got 'netrpc'"),
        ("certificate", "unexpected TLS certificate in the handshake line"),
        ("network", "not a valid address in the handshake line: 'udp' '/nowhere'"),
        (
            "exit",
            "exited with code 3 before its handshake; its last lines: config.toml: line 3: no such key | giving up",
        ),
        ("unhealthy", "plugin 'fake': health of service 'plugin': expected SERVING, got not supported"),
    ],
)
async def test_malformed_handshake_fails_the_launch(launch_fake: Launch, mode: str, told: str) -> None:
    with pytest.raises(PluginProcessError, match=re.escape(told)):
        await launch_fake(mode)
    assert no_children()


async def test_missing_handshake_fails_the_launch_in_time(launch_fake: Launch) -> None:
    ready = asyncio.Event()
    # Long enough that the interpreter is up and has said what it has to say.
    starting = asyncio.ensure_future(launch_fake("hang", start_timeout=pace(2), on_log=lambda _line: ready.set()))
    await asyncio.wait_for(ready.wait(), LIMIT)
    with pytest.raises(PluginProcessError, match=r"had not completed the handshake within [\d.]+ s.*misbehaves"):
        await starting
    assert no_children()


@pytest.mark.promise("F24")
async def test_cancelled_launch_leaves_no_process(launch_fake: Launch) -> None:
    ready = asyncio.Event()
    starting = asyncio.ensure_future(launch_fake("hang", on_log=lambda _line: ready.set()))
    await asyncio.wait_for(ready.wait(), LIMIT)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert no_children()


async def test_program_that_cannot_be_run_fails_the_launch(tmp_path: Path) -> None:
    with pytest.raises(PluginProcessError, match=r"cannot be run: .*no-such-file.*plugin.yaml's platforms"):
        await launch([str(tmp_path / "no-such-file")])
    if sys.platform != "win32":
        (tmp_path / "data").write_text("no program")
        with pytest.raises(PluginProcessError, match=r"cannot be run: .*chmod \+x"):
            await launch([str(tmp_path / "data")])


@pytest.mark.promise("P1")
@pytest.mark.parametrize("mode", ["normal", "slow-shutdown", "ignores-shutdown", "plain"])
async def test_kill_ends_within_its_limit(launch_fake: Launch, mode: str) -> None:
    plugin = await launch_fake(mode)
    await within(asyncio.gather(plugin.kill(), plugin.kill()))
    assert (plugin.returncode == 0) is (mode == "normal")
    await plugin.kill()
    assert no_children()


async def test_kill_does_not_wait_for_a_grandchild_that_holds_the_pipes(launch_fake: Launch) -> None:
    pids: list[int] = []

    def on_log(line: LogLine) -> None:
        if line.message == "grandchild":
            pids.append(line.kv["pid"])

    plugin = await launch_fake("grandchild", on_log=on_log)
    try:
        await within(plugin.kill())
        assert plugin.returncode == 0
        assert psutil.pid_exists(pids[0])
    finally:
        for pid in pids:
            psutil.Process(pid).kill()


async def test_cancelled_kill_still_ends_the_process(launch_fake: Launch) -> None:
    plugin = await launch_fake("slow-shutdown")
    killing = asyncio.ensure_future(plugin.kill())
    await asyncio.sleep(0)
    killing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await killing
    await plugin.kill()
    assert plugin.returncode is not None


def test_host_that_ends_early_leaves_no_process(fake_environment: dict[str, str]) -> None:
    """asyncio.run cancels all tasks, and a cancelled background kill still kills the process."""

    async def main() -> PluginClient:
        plugin = await launch(
            [sys.executable, str(FAKE_PLUGIN)],
            env=fake_environment | {"FAKE_MODE": "slow-shutdown"},
            start_timeout=LIMIT,
        )
        killing = asyncio.ensure_future(plugin.kill())
        await asyncio.sleep(0)
        killing.cancel()
        return plugin

    plugin = asyncio.run(main())
    assert plugin.pid is not None
    psutil.wait_procs([psutil.Process(plugin.pid)] if psutil.pid_exists(plugin.pid) else [], timeout=LIMIT)
    assert not psutil.pid_exists(plugin.pid) or psutil.Process(plugin.pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.promise("G40")
async def test_connect_to_a_given_address_calls_the_plugin(launch_fake: Launch) -> None:
    async with await launch_fake() as launched:
        async with await connect(launched.address) as plugin:
            assert plugin.pid is None
            assert plugin.name == launched.address
            assert await plugin.get_version() == "1.2.3"
        assert await launched.get_version() == "1.2.3"  # its kill closed the connection only
        async with await connect(launched.address) as plugin:
            await plugin.shutdown()
        assert launched._link.process is not None
        assert await launched._link.process.wait(LIMIT)
        assert launched.returncode == 0


async def test_connect_without_a_listener_fails_in_time(sockets: Path) -> None:
    with pytest.raises(UnavailableError, match="nothing answers at unix:"):
        await connect(f"unix:{sockets}/missing.sock", timeout=pace(0.5))
