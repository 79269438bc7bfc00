"""Fixtures for tests of attached servers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.ollama.address import ServerAddress
from engine_plugin.engines.ollama.attached import AttachedOllama
from engine_plugin.engines.ollama.options import OllamaOptions
from tests.engines.ollama.contract.handle import ContractServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from engine_plugin.engines.ollama.client import OllamaClient

__all__ = ["attached", "attached_server", "shared_client", "shared_server"]


def attached_server(url: str, environ: dict[str, str] | None = None, **options: object) -> AttachedOllama:
    """An AttachedOllama for a URL; `options` are fields of OllamaOptions."""
    return AttachedOllama(ServerAddress.parse(url, "the test"), OllamaOptions(**options), environ or {})  # type: ignore[arg-type]  # as read_options does


@pytest.fixture
async def attached(contract_server: ContractServer) -> AsyncIterator[OllamaClient]:
    """A client of the contract server."""
    server = attached_server(contract_server.url)
    try:
        client = await server.find()
        assert client is not None
        yield client
    finally:
        await server.detach()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContractServer]:
    """A contract server for the tests of a module that do not change its models."""
    server = ContractServer(tmp_path_factory.mktemp("shared"))
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
async def shared_client(shared_server: ContractServer) -> AsyncIterator[OllamaClient]:
    """A client of the shared server, whose journal begins with the test."""
    server = attached_server(shared_server.url)
    try:
        client = await server.find()
        assert client is not None
        shared_server.forget()
        yield client
    finally:
        shared_server.mend()
        await server.detach()
