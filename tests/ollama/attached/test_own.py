"""The engine with a server of our own: when it is the one, what starts it, and that it ends."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import pytest

from engine_plugin.engines.base import HealthState
from engine_plugin.errors import BadGatewayError, EngineNotInstalledError, ModelNotFoundError, UnavailableError
from engine_plugin.models.request import PullRequest
from engine_plugin.process.ports import free_ports
from tests.models.fakes import pulled
from tests.ollama.contract.release import write_program

from .engine import HELLO, answer, plugin_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from engine_plugin.plugin import Plugin
    from tests.ollama.contract.handle import ContractServer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for ollama is a script with #!")


@pytest.fixture
def ollama(tmp_path: Path) -> str:
    """The path of a program that is our contract server."""
    return str(write_program(tmp_path / "bin"))


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server of somebody else's is on this machine."""
    [port] = free_ports(1)
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{port}")


@pytest.fixture
async def plugin(tmp_path: Path, ollama: str, nobody: None) -> AsyncIterator[Plugin]:
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
async def test_start_runs_it_and_stop_ends_it(plugin: Plugin, ollama: str) -> None:
    assert (await plugin.check()).installed
    for waiting in (answer(plugin, "chat", messages=HELLO), plugin.list_models(), plugin.health()):
        with pytest.raises(UnavailableError, match="StartEngine"):
            await waiting
    assert not servers(ollama), "nothing but a start starts it"
    await plugin.start("auto")
    assert servers(ollama)
    health = await plugin.health()
    assert health.state is HealthState.READY
    assert health.detail.startswith(f"our own Ollama {await plugin.version()} at http://127.0.0.1:")
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
async def test_a_pull_starts_it_since_models_get_there_only_through_it(plugin: Plugin, ollama: str) -> None:
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
    assert not servers(ollama), "who stopped it wants it stopped"


async def test_somebody_elses_server_comes_first_unless_plugin_yaml_says_otherwise(
    contract_server: ContractServer, tmp_path: Path, ollama: str
) -> None:
    for place, server, theirs in (("a", "auto", True), ("b", "manage", False)):
        (tmp_path / place).mkdir()
        async with plugin_in(
            tmp_path / place, engine_host=contract_server.url, ollama=ollama, server=server
        ) as plugin:
            await plugin.start("auto")
            assert ("attached to" in (await plugin.health()).detail) is theirs
            assert bool(servers(ollama)) is not theirs
    assert not servers(ollama)
    assert contract_server.process.poll() is None


async def test_once_it_runs_it_stays_the_one(contract_server: ContractServer, tmp_path: Path, ollama: str) -> None:
    """Somebody who starts an Ollama later does not take our calls away from the models that we have."""
    contract_server.be_version("0.1.0")  # so that it would be noticed
    async with plugin_in(tmp_path, engine_host=contract_server.url, ollama=ollama, server="manage") as plugin:
        await plugin.start("auto")
        await plugin.start("auto")
        assert (await answer(plugin, "chat", messages=HELLO, max_tokens=1))["choices"]
        assert not contract_server.requests()


async def test_without_software_the_start_says_how_to_have_it(tmp_path: Path, nobody: None) -> None:
    async with plugin_in(tmp_path, server="manage", ollama=str(tmp_path / "no" / "ollama")) as plugin:
        assert not (await plugin.check()).installed
        with pytest.raises(EngineNotInstalledError, match="ollama"):
            await plugin.start("auto")


async def test_another_mode_moves_it_with_its_models(plugin: Plugin, ollama: str) -> None:
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


@pytest.mark.promise("F20", "P2")
async def test_its_death_is_mended(plugin: Plugin, ollama: str) -> None:
    await plugin.start("auto")
    host = plugin.config()["host"]
    [server] = [
        process
        for process in servers(ollama)
        if any(f"127.0.0.1:{listening.laddr.port}" == host for listening in process.net_connections("tcp"))
    ]
    server.kill()
    with suppress(BadGatewayError):  # a call that meets the death itself is told of it
        await answer(plugin, "chat", messages=HELLO, max_tokens=1)
    assert (await answer(plugin, "chat", messages=HELLO, max_tokens=1))["choices"]
    assert plugin.config()["host"] != host
