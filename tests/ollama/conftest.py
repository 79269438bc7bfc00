"""Ollama servers for tests: our contract server, or the one that OLLAMA_TEST_HOST names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from .contract.handle import ContractServer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["contract_server", "ollama_environment"]


@pytest.fixture(autouse=True)
def ollama_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test meets an Ollama that happens to be on this machine, but for those that are meant to."""
    for name in list(os.environ):
        if name.startswith("OLLAMA_") and not name.startswith("OLLAMA_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")


@pytest.fixture
def contract_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContractServer]:
    """A contract server with the models that it begins with, on a free port, for one test."""
    server = ContractServer(tmp_path_factory.mktemp("ollama"))
    try:
        yield server
    finally:
        server.close()
