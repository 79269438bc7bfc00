"""What the tests of the way to somebody else's server share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.ollama.address import ServerAddress
from engine_plugin.engines.ollama.attachment import Attachment
from engine_plugin.engines.ollama.options import OllamaOptions
from tests.ollama.contract.handle import ContractServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from engine_plugin.engines.ollama.connection import OllamaClient

__all__ = ["attached", "attachment_to", "shared_client", "shared_server"]


def attachment_to(url: str, environ: dict[str, str] | None = None, **options: object) -> Attachment:
    """An attachment to whatever is there; `options` are fields of OllamaOptions."""
    return Attachment(ServerAddress.parse(url, "the test"), OllamaOptions(**options), environ or {})  # type: ignore[arg-type]  # as read_options does


@pytest.fixture
async def attached(contract_server: ContractServer) -> AsyncIterator[OllamaClient]:
    """A client of the contract server."""
    attachment = attachment_to(contract_server.url)
    try:
        client = await attachment.find()
        assert client is not None
        yield client
    finally:
        await attachment.detach()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContractServer]:
    """A contract server for those tests of a module that leave its models as they are."""
    server = ContractServer(tmp_path_factory.mktemp("shared"))
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
async def shared_client(shared_server: ContractServer) -> AsyncIterator[OllamaClient]:
    """A client of it; what it was asked is counted from here."""
    attachment = attachment_to(shared_server.url)
    try:
        client = await attachment.find()
        assert client is not None
        shared_server.forget()
        yield client
    finally:
        shared_server.mend()
        await attachment.detach()
