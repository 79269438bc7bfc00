"""The models of an attached Ollama, without a server of `engine-plugin serve`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.engines.ollama.contract.handle import ContractServer

from .conftest import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Workplace

pytestmark = pytest.mark.slow


@pytest.fixture
def ollama(workplace: Workplace, tmp_path: Path) -> Iterator[ContractServer]:
    """A contract server, and the workplace's plugin as the one for Ollama."""
    shutil.copy(REPOSITORY / "plugins" / "ollama" / "plugin.yaml", workplace.plugin / "plugin.yaml")
    for name in [name for name in workplace.env if name.startswith("OLLAMA_")]:
        del workplace.env[name]
    server = ContractServer(tmp_path / "ollama")
    try:
        workplace.env["OLLAMA_HOST"] = server.address
        yield server
    finally:
        server.close()


def test_models_are_loaded_and_unloaded_at_an_attached_server(workplace: Workplace, ollama: ContractServer) -> None:
    assert workplace.good("models", "load", "tiny-chat") == "loaded tiny-chat\n"
    [entry] = json.loads(workplace.good("models", "ps", "--json"))
    assert entry["name"] == "tiny-chat:latest"
    assert entry["loaded"]["memory"] > 0
    assert workplace.good("models", "unload", "tiny-chat") == "unloaded tiny-chat\n"
    assert ollama.ask("GET", "/api/ps")["models"] == []
    ollama.close()
    assert "ollama" in workplace.bad(4, "models", "ps").lower()


def test_attached_server_pulls_copies_and_uses_models(workplace: Workplace, ollama: ContractServer) -> None:
    done = workplace.run("models", "pull", "fresh")
    assert (done.returncode, done.stdout) == (0, "pulled fresh:latest\n")
    assert "pulling manifest" not in done.stderr
    assert "100% of 46 MiB" in done.stderr.splitlines()
    assert workplace.good("models", "copy", "fresh", "mine:1b") == "copied fresh to mine:1b\n"
    assert "mine:1b" in ollama.names()
    before = (workplace.plugin / "plugin.yaml").read_text()
    used = json.loads(workplace.good("models", "use", "mine:1b", "--json"))
    assert json.loads(Path(used["file"]).read_text()) == {"chat": "mine:1b", "generate": "mine:1b"}
    assert (workplace.plugin / "plugin.yaml").read_text() == before
    done = workplace.run("embed", "a", "--model", "fresh:1b", "--auto-pull")
    assert done.stderr.startswith("model fresh:1b is missing; pulling it\n")
    assert "fresh:1b" in ollama.names()


def test_status_reports_a_server_that_is_too_old(workplace: Workplace, ollama: ContractServer) -> None:
    ollama.be_version("0.3.12")
    said = workplace.good("status")
    assert "0.3.12 is too old" in said
    assert "plugin:  ollama-plugin" in said
    assert "0.3.12 is too old" in workplace.run("engine", "status").stdout


def test_engine_status_shows_an_attached_server(workplace: Workplace, ollama: ContractServer) -> None:
    workplace.good("models", "load", "tiny-chat")
    said = workplace.good("engine", "status")
    assert f"at http://{ollama.address}" in said
    assert "model:   tiny-chat:latest" in said
    ollama.close()
    said = workplace.bad(4, "engine", "check")
    assert said.count("engine-plugin engine install") == 1
    assert "ollama serve" in said
    done = workplace.run("engine", "status")
    assert done.returncode == 4
    assert "ollama serve" in done.stdout
    assert "engine start" not in done.stderr
