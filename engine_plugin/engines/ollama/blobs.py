"""Files of this machine on their way to an Ollama server, piece by piece: they may be larger than the memory."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from engine_plugin.download.events import ChunkProgress, Status
from engine_plugin.engines.ollama.errors import complaint_error, complaint_of_body
from engine_plugin.errors import PullError
from engine_plugin.files import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from engine_plugin.download.events import PullEvent
    from engine_plugin.engines.ollama.connection import OllamaClient

__all__ = ["sha256_of", "upload"]

_PIECE = 4 * 1024 * 1024
_STALL = 120.0
_ABSENT = 404


async def sha256_of(path: Path) -> str:
    """The digest of a file, in hex. Raises PullError when it cannot be read."""
    found = hashlib.sha256()
    async for piece in _pieces(path):
        await in_thread(found.update, piece)
    return found.hexdigest()


async def upload(client: OllamaClient, path: Path, digest: str, publish: Callable[[PullEvent], None]) -> None:
    """Send the file, unless the server has its bytes already. Raises PullError, or what a refusal means."""
    import httpx  # the client on the token's way holds a whole body in memory

    place = f"{client.url}/api/blobs/sha256:{digest}"
    size = (await in_thread(path.stat)).st_size

    async def told() -> AsyncGenerator[bytes, None]:
        sent = 0
        async for piece in _pieces(path):
            yield piece
            sent += len(piece)
            publish(ChunkProgress(f"sha256:{digest}", sent, size))

    try:
        async with httpx.AsyncClient(timeout=_STALL, trust_env=False, headers=client.headers) as http:
            answer = await http.head(place)
            if answer.status_code == _ABSENT:
                publish(Status(f"sending {path.name}"))
                answer = await http.post(place, content=told(), headers={"content-length": str(size)})
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise PullError(f"model: {path.name} could not be sent to the Ollama server: {reason}") from error
    if not answer.is_success:
        raise complaint_error(complaint_of_body(answer.status_code, answer.content))


async def _pieces(path: Path) -> AsyncGenerator[bytes, None]:
    try:
        file = await in_thread(path.open, "rb")
        try:
            while piece := await in_thread(file.read, _PIECE):
                yield piece
        finally:
            await in_thread(file.close)
    except OSError as error:
        raise PullError(f"model: {path} cannot be read: {error.strerror or error}") from error
