"""The shipped plugin with an Ollama of its own, as a host has it: nothing, installed, used, upgraded, killed."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import EnginePluginError, UnavailableError
from tests.engines.llamacpp.running import MARK, eventually, gone
from tests.patience import LIMIT

from .hosted import Hosted, hosted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.engines.ollama.contract.handle import ContractServer
    from tests.engines.ollama.contract.release import Mirror

pytestmark = pytest.mark.slow


@asynccontextmanager
async def plugin(scratch: Path, **options: Any) -> AsyncIterator[Hosted]:
    """A running plugin; afterwards no process of it may be left."""
    temporary = scratch / "tmp"  # a killed plugin leaves its socket there
    temporary.mkdir(exist_ok=True)
    environ = dict(os.environ) | {MARK: uuid.uuid4().hex, "TMPDIR": str(temporary)}
    running = await hosted(scratch, environ, **options)
    try:
        yield running
    finally:
        offspring = running.offspring()
        await running.client.kill()
        await eventually(lambda: all(gone(process) for process in offspring))


@pytest.mark.promise("F5", "P13")
async def test_install_call_and_upgrade(scratch: Path, mirror: Mirror) -> None:
    mirror.publish("0.33.0", "--runners")
    async with plugin(scratch, version="0.33.0", mirror=mirror.url) as running:
        with pytest.raises(UnavailableError, match=r"no Ollama server answers at .*call InstallEngine"):
            await running.client.start_engine()
        assert not await running.client.check_engine()
        assert "version 0.33.0" in await running.client.install_engine()
        assert await running.client.check_engine()
        await running.client.start_engine()
        assert await running.client.get_version() == "0.33.0"
        await running.client.pull_model("fresh")
        assert [entry["name"] for entry in await running.client.list_models()] == ["fresh:latest"]
        assert await running.say("good morning") == "good morning"
        assert await running.loaded() == ["fresh:latest"]
        await eventually(lambda: len(running.offspring()) == 3)  # the guard, the server, the runner of the model
        await running.client.stop_engine()
        await eventually(lambda: running.offspring() == [])

    mirror.publish("0.33.1", "--fail", "this machine is not for me")
    async with plugin(scratch, version="0.33.1", mirror=mirror.url) as running:
        await running.client.start_engine()
        await running.client.load_model("fresh")
        await eventually(lambda: len(running.offspring()) == 3)
        former = running.offspring()
        with pytest.raises(EnginePluginError, match=r"was not changed: .*this machine is not for me"):
            await running.client.upgrade_engine()
        after = running.offspring()
        assert after == former, [(each.pid, each.ppid(), each.cmdline()) for each in after if each not in former]
        assert await running.client.get_version() == "0.33.0"
        assert await running.say("still here") == "still here"
        mirror.publish("0.33.1", "--runners")
        assert "upgraded: " in await running.client.upgrade_engine()
        assert await running.client.get_version() == "0.33.1"
        assert all(gone(process) for process in former)
        assert await running.loaded() == ["fresh:latest"]
        assert await running.say("good evening") == "good evening"


@pytest.mark.promise("U10")
async def test_unanswered_request_is_sent_to_the_upgraded_server(scratch: Path, mirror: Mirror) -> None:
    mirror.publish("0.33.0", "--runners")
    async with plugin(scratch, server="manage", version="0.33.0", mirror=mirror.url, drain_timeout=0.2) as running:
        await running.client.install_engine()
        await running.client.start_engine()
        await running.client.pull_model("fresh")
        contract = await running.contract()
        await asyncio.to_thread(contract.fail, "silent", path="/api/chat", times=1)
        asking = asyncio.create_task(running.say("at last"))
        await contract.wait("/api/chat", state="open")
        await running.client.start_engine("cpu")
        async with asyncio.timeout(LIMIT):
            assert await asking == "at last"


async def asked_again(running: Hosted) -> None:
    """Wait until the health is an error; it is degraded until the server's end is confirmed."""
    while True:
        await running.client.health_check()


@pytest.mark.promise("H7")
async def test_health_is_503_after_the_restart_limit_until_a_start(scratch: Path, mirror: Mirror) -> None:
    mirror.publish("0.33.0")
    async with plugin(scratch, server="manage", version="0.33.0", mirror=mirror.url, restart_limit=0) as running:
        await running.client.install_engine()
        await running.client.start_engine()
        server = running.server()
        assert server is not None
        server.kill()
        with pytest.raises(UnavailableError, match="the managed Ollama server died: SIGKILL"):
            await asyncio.wait_for(asked_again(running), LIMIT)
        await running.client.start_engine()
        assert (await running.client.health_check()).startswith("ready")


@pytest.mark.promise("F5", "F7", "P2", "P11")
async def test_killed_server_is_restarted_and_ends_with_a_killed_plugin(
    scratch: Path, mirror: Mirror, contract_server: ContractServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed server is restarted. A killed plugin leaves no process, even while it answers.

    The user's server at OLLAMA_HOST gets no request.
    """
    monkeypatch.setenv("OLLAMA_HOST", contract_server.address)
    mirror.publish("0.33.0", "--runners")
    async with plugin(scratch, server="manage", version="0.33.0", mirror=mirror.url) as running:
        await running.client.install_engine()
        await running.client.start_engine()
        await running.client.pull_model("fault-stall")
        family = running.offspring()
        server = running.server()
        assert server is not None
        server.kill()
        await eventually(lambda: all(gone(process) for process in family))
        await eventually(lambda: running.server() is not None)
        await running.client.pull_model("fresh")
        assert await running.say("back again") == "back again"
        assert (await running.client.health_check()).startswith("ready")
        await running.client.unload_model("fresh")

        request = {"model": "fault-stall", "messages": [{"role": "user", "content": "hello"}]}
        asking = asyncio.create_task(running.client.invoke("chat", request))
        await (await running.contract()).wait("/api/chat", state="open")
        family = running.offspring()
        assert len(family) == 3, "the guard, the server, the runner of the model"
        assert running.client.pid is not None
        os.kill(running.client.pid, signal.SIGKILL)
        with pytest.raises(EnginePluginError):
            await asking
        await eventually(lambda: all(gone(process) for process in family))
    assert contract_server.process.poll() is None
    assert contract_server.requests() == []
