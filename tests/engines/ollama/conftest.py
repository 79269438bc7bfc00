"""Ollama servers for tests: the contract server, or the one at OLLAMA_TEST_HOST."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.ollama.address import ServerAddress

from .contract.handle import ContractServer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Ollama", "any_ollama", "contract_server", "ollama_environment"]

_HOST, _MODEL = "OLLAMA_TEST_HOST", "OLLAMA_TEST_MODEL"


@pytest.fixture(autouse=True)
def ollama_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide an Ollama on this machine from all tests but those for OLLAMA_TEST_HOST."""
    for name in list(os.environ):
        if name.startswith("OLLAMA_") and not name.startswith("OLLAMA_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")


@pytest.fixture
def contract_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContractServer]:
    """A contract server with its default models on a free port, for one test."""
    server = ContractServer(tmp_path_factory.mktemp("ollama"))
    try:
        yield server
    finally:
        server.close()


@dataclass(frozen=True)
class Ollama:
    """A server with Ollama's API, and one of its chat models."""

    url: str
    model: str


@pytest.fixture(
    scope="module",
    params=[
        "contract",
        pytest.param(
            "real",
            marks=[
                pytest.mark.real_ollama,
                pytest.mark.skipif(not os.environ.get(_HOST), reason=f"{_HOST} names no Ollama"),
            ],
        ),
    ],
)
def any_ollama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ollama]:
    """The contract server, and then the real one if there is one.

    Tests pull nothing there, and delete what they add.
    """
    if request.param == "real":
        address = ServerAddress.parse(os.environ[_HOST])
        name = os.environ.get(_MODEL, "smollm2:135m")
        yield Ollama(address.url, name if ":" in name.rpartition("/")[2] else f"{name}:latest")
        return
    server = ContractServer(tmp_path_factory.mktemp("any"))
    try:
        yield Ollama(server.url, "tiny-chat:latest")
    finally:
        server.close()
