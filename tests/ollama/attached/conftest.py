"""What the tests of the way to somebody else's server share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.ollama.address import ServerAddress
from engine_plugin.engines.ollama.attachment import Attachment
from engine_plugin.engines.ollama.options import OllamaOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from engine_plugin.engines.ollama.connection import OllamaClient
    from tests.ollama.contract.handle import ContractServer

__all__ = ["attached", "attachment_to"]


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
