"""Files of this machine on their way to an Ollama server, piece by piece: they may be larger than the memory."""

from __future__ import annotations

import hashlib
import ssl
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from engine_plugin.download.events import ChunkProgress, Status
from engine_plugin.engines.ollama.errors import complaint_error, complaint_of_body
from engine_plugin.errors import InvalidRequestError, PullError
from engine_plugin.system.files import LFS_POINTER, in_thread, opened
from engine_plugin.transport.answers import one_line

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    import httpx

    from engine_plugin.download.events import PullEvent
    from engine_plugin.engines.ollama.connection import OllamaClient

__all__ = ["require_gguf", "sha256_of", "upload"]

_PIECE = 4 * 1024 * 1024
_STALL = 120.0
_ABSENT = 404
_MAGIC = (b"GGUF", b"FUGG")
"""How GGUF files begin, of machines of both byte orders."""
_SAID = 4096
_SHOWN = 300


async def require_gguf(path: Path) -> None:
    """Raise InvalidRequestError unless a file begins as GGUF files do: it need not be sent to hear that from the
    server. Raises PullError when it cannot be read."""
    async with aclosing(_pieces(path)) as pieces:
        begins = await anext(pieces, b"")
    if begins.startswith(LFS_POINTER):
        raise InvalidRequestError.at(
            "model", f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its clone, or download it"
        )
    if not begins.startswith(_MAGIC):
        raise InvalidRequestError.at(
            "model", f"{path} is no GGUF file: it begins with {begins[:4]!r}. Take another, or convert it to GGUF"
        )


async def sha256_of(path: Path) -> str:
    """The digest of a file, in hex. Raises PullError when it cannot be read."""
    found = hashlib.sha256()
    async with aclosing(_pieces(path)) as pieces:
        async for piece in pieces:
            await in_thread(found.update, piece)
    return found.hexdigest()


async def upload(client: OllamaClient, path: Path, digest: str, publish: Callable[[PullEvent], None]) -> None:
    """Send the file, unless the server has its bytes already. Raises PullError, or what a refusal means."""
    import httpx  # the client on the token's way holds a whole body in memory

    place = f"{client.url}/api/blobs/sha256:{digest}"
    size = (await in_thread(path.stat)).st_size

    async def told() -> AsyncGenerator[bytes, None]:
        sent = 0
        async with aclosing(_pieces(path)) as pieces:
            async for piece in pieces:
                yield piece
                sent += len(piece)
                publish(ChunkProgress(f"sha256:{digest}", sent, size))

    head = {**client.headers, "accept-encoding": "identity"}
    tls = await in_thread(ssl.create_default_context) if place.startswith("https:") else False
    try:
        async with (
            httpx.AsyncClient(timeout=_STALL, trust_env=False, headers=head, verify=tls) as http,
            aclosing(told()) as content,  # which holds the file
        ):
            status, said = await _answer(http, "HEAD", place)
            if status == _ABSENT:
                publish(Status(f"sending {path.name}"))
                status, said = await _answer(http, "POST", place, content=content, headers=_length(size))
    except httpx.HTTPError as error:
        reason = one_line(str(error))[:_SHOWN] or type(error).__name__
        raise PullError(f"model: {path.name} could not be sent to the Ollama server: {reason}") from error
    if not 200 <= status < 300:
        raise complaint_error(complaint_of_body(status, said))


def _length(size: int) -> dict[str, str]:
    return {"content-length": str(size)}


async def _answer(http: httpx.AsyncClient, method: str, place: str, **more: Any) -> tuple[int, bytes]:
    """The status, and the beginning of what is said to it: nobody has to read what does not end."""
    said = b""
    async with http.stream(method, place, **more) as answer:
        if not answer.is_success:
            async for piece in answer.aiter_raw():
                said += piece
                if len(said) >= _SAID:
                    break
    return answer.status_code, said


async def _pieces(path: Path) -> AsyncGenerator[bytes, None]:
    try:
        async with opened(path) as file:
            while piece := await in_thread(file.read, _PIECE):
                yield piece
    except OSError as error:
        raise PullError(f"model: {path} cannot be read: {error.strerror or error}") from error
