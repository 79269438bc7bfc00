"""The engine with a managed server: when it is used, what starts it, and its end."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import pytest

from engine_plugin.engines.base import HealthState
from engine_plugin.engines.ollama import managed
from engine_plugin.engines.ollama.models import ServerModels
from engine_plugin.errors import BadGatewayError, EngineNotInstalledError, ModelNotFoundError, UnavailableError
from engine_plugin.models.request import PullRequest
from engine_plugin.process.ports import free_ports
from tests.engines.ollama.contract.release import write_program
from tests.models.fakes import pulled
from tests.patience import LIMIT

from .engine import HELLO, answer, plugin_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from engine_plugin.plugin import Plugin
    from tests.engines.ollama.contract.handle import ContractServer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for ollama is a script with #!")


@pytest.fixture
def ollama(tmp_path: Path) -> str:
    """The path of a program that runs the contract server."""
    return str(write_program(tmp_path / "bin"))


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no server at the address of OLLAMA_HOST."""
    [port] = free_ports(1)
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{port}")


@pytest.fixture
async def plugin(tmp_path: Path, ollama: str, no_server: None) -> AsyncIterator[Plugin]:
    async with plugin_in(tmp_path, ollama=ollama) as found:
        yield found


def servers(program: str) -> list[psutil.Process]:
    """The processes that run the program."""
    found = []
    for process in psutil.process_iter():
        try:
            if program in process.cmdline():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.promise("F5", "P7")
async def test_managed_server_runs_from_start_to_stop(plugin: Plugin, ollama: str) -> None:
    assert (await plugin.check()).installed
    for waiting in (answer(plugin, "chat", messages=HELLO), plugin.list_models(), plugin.health()):
        with pytest.raises(UnavailableError, match="StartEngine"):
            await waiting
    assert not servers(ollama), "calls do not start the server"
    await plugin.start("auto")
    assert servers(ollama)
    health = await plugin.health()
    assert health.state is HealthState.READY
    assert health.detail.startswith(f"managed Ollama {await plugin.version()} at http://127.0.0.1:")
    assert (await answer(plugin, "chat", messages=HELLO, max_tokens=2))["choices"]
    assert {model.name for model in await plugin.list_models()}
    [running] = await plugin.running_models()
    await plugin.unload_model(running.name)
    assert await plugin.running_models() == []
    await plugin.stop()
    assert not servers(ollama)
    with pytest.raises(UnavailableError, match="StartEngine"):
        await answer(plugin, "chat", messages=HELLO)


@pytest.mark.promise("P7")
async def test_pull_starts_the_managed_server(plugin: Plugin, ollama: str) -> None:
    events = await pulled(plugin, PullRequest("fresh"))
    assert events
    assert servers(ollama)
    assert "fresh:latest" in {model.name for model in await plugin.list_models()}
    await plugin.delete_model("fresh")
    with pytest.raises(ModelNotFoundError):
        await answer(plugin, "chat", model="fresh", messages=HELLO)
    await plugin.stop()
    with pytest.raises(UnavailableError, match="StartEngine"):
        await pulled(plugin, PullRequest("fresh"))
    assert not servers(ollama), "a pull after StopEngine does not start the server"


async def test_attached_server_is_preferred_unless_manage(
    contract_server: ContractServer, tmp_path: Path, ollama: str
) -> None:
    for place, server, attached in (("a", "auto", True), ("b", "manage", False)):
        (tmp_path / place).mkdir()
        async with plugin_in(
            tmp_path / place, engine_host=contract_server.url, ollama=ollama, server=server
        ) as plugin:
            await plugin.start("auto")
            assert ("attached to" in (await plugin.health()).detail) is attached
            assert bool(servers(ollama)) is not attached
    assert not servers(ollama)
    assert contract_server.process.poll() is None


async def test_running_managed_server_is_kept(contract_server: ContractServer, tmp_path: Path, ollama: str) -> None:
    """An Ollama that is started later does not replace the managed server."""
    contract_server.be_version("0.1.0")  # its use would raise an error
    async with plugin_in(tmp_path, engine_host=contract_server.url, ollama=ollama, server="manage") as plugin:
        await plugin.start("auto")
        await plugin.start("auto")
        assert (await answer(plugin, "chat", messages=HELLO, max_tokens=1))["choices"]
        assert not contract_server.requests()


async def test_start_without_software_names_the_next_step(tmp_path: Path, no_server: None) -> None:
    async with plugin_in(tmp_path, server="manage", ollama=str(tmp_path / "no" / "ollama")) as plugin:
        assert not (await plugin.check()).installed
        with pytest.raises(EngineNotInstalledError, match="ollama"):
            await plugin.start("auto")


async def test_other_mode_restarts_with_the_loaded_models(plugin: Plugin, ollama: str) -> None:
    await plugin.start("auto")
    await plugin.load_model("tiny-chat")
    await plugin.load_model("embed")
    before = {process.pid for process in servers(ollama)}
    await plugin.start("auto")
    assert {process.pid for process in servers(ollama)} == before
    await plugin.start("cpu")
    after = servers(ollama)
    assert after
    assert not {process.pid for process in after} & before
    assert any(process.environ().get("CUDA_VISIBLE_DEVICES") == "-1" for process in after)
    assert {model.name for model in await plugin.running_models()} == {"tiny-chat:latest", "embed:latest"}
    assert plugin.config()["device_type"] == "cpu"


async def test_models_that_load_too_slowly_do_not_delay_a_restart(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    await plugin.start("auto")
    await plugin.load_model("tiny-chat")
    monkeypatch.setattr(ServerModels, "load", never)
    monkeypatch.setattr(managed, "RELOAD_TIMEOUT", 0.01)
    async with asyncio.timeout(LIMIT):
        await plugin.start("cpu")
    assert plugin.config()["device_type"] == "cpu"
    assert "tiny-chat:latest" in caplog.text
    assert "not loaded again within 0.01 s" in caplog.text


@pytest.mark.promise("F20", "P2")
async def test_killed_managed_server_is_restarted(plugin: Plugin, ollama: str) -> None:
    await plugin.start("auto")
    host = plugin.config()["host"]
    [server] = [
        process
        for process in servers(ollama)
        if any(f"127.0.0.1:{listening.laddr.port}" == host for listening in process.net_connections("tcp"))
    ]
    server.kill()
    with suppress(BadGatewayError):  # a call during the death may fail
        await answer(plugin, "chat", messages=HELLO, max_tokens=1)
    assert (await answer(plugin, "chat", messages=HELLO, max_tokens=1))["choices"]
    assert plugin.config()["host"] != host
