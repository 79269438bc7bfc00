"""A contract server for all tests of this package, and the service calls on it."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from engine_plugin.engines.ollama.client import OllamaClient
from engine_plugin.engines.ollama.exchange import Exchange
from engine_plugin.transport.http1 import Http1Client
from tests.engines.ollama.contract.handle import ContractServer

from .shapes import facts_of, no_replacement

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from engine_plugin.engines.ollama.models import ModelFacts


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContractServer]:
    """One contract server for the tests of this package that do not change its rules."""
    server = ContractServer(tmp_path_factory.mktemp("ollama"))
    try:
        yield server
    finally:
        server.close()


class ServiceClient:
    """Calls services as the engine does."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.http = Http1Client(address)
        self.client = OllamaClient(self.http)

    async def call(self, service: str, request: dict[str, Any], facts: ModelFacts | None = None) -> bytes:
        """One unary answer."""
        return await self._exchange(service, request, facts).call(request)

    async def blocks(
        self, service: str, request: dict[str, Any], facts: ModelFacts | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The blocks of a stream."""
        async with self._exchange(service, request, facts).stream(request) as blocks:
            async for block in blocks:
                yield block

    async def collected(self, service: str, request: dict[str, Any], facts: ModelFacts | None = None) -> bytes:
        """A whole stream."""
        async with aclosing(self.blocks(service, request, facts)) as blocks:
            return b"".join([block async for block in blocks])

    def _exchange(self, service: str, request: dict[str, Any], facts: ModelFacts | None) -> Exchange:
        return Exchange(self.client, service, facts or facts_of(request["model"]), no_replacement)


@pytest_asyncio.fixture
async def ask(server: ContractServer) -> AsyncIterator[ServiceClient]:
    """Service calls on the shared server."""
    asker = ServiceClient(("127.0.0.1", server.port))
    yield asker
    asker.http.close()
