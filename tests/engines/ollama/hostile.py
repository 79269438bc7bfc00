"""A server in the place of an Ollama that sends any bytes that a test sets."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["DIGEST", "DONE", "Hostile", "entry", "lines", "text_line", "until_end", "whole"]

DIGEST = "ab" * 32
DONE = {"model": "m:latest", "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


def whole(body: bytes | Any, head: str = "content-type: application/json", status: str = "200 OK") -> bytes:
    """An answer with a content-length; `body` is bytes, or is encoded as JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{head}\r\n\r\n".encode() + body


def until_end(*pieces: bytes, head: str = "content-type: application/x-ndjson") -> list[bytes]:
    """An answer that ends with its connection, sent in pieces."""
    return [f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode(), *pieces]


def lines(*shapes: Any, end: bytes = b"\n") -> bytes:
    """JSON lines in Go's format."""
    return b"".join(json.dumps(shape, separators=(",", ":")).encode() + end for shape in shapes)


def text_line(text: str) -> dict[str, Any]:
    """A line of a chat stream."""
    message = {"role": "assistant", "content": text}
    return {"model": "m:latest", "created_at": "2026-01-01T00:00:00Z", "message": message, "done": False}


def entry(name: str = "m:latest", **more: Any) -> dict[str, Any]:
    """A list entry of a model with all capabilities."""
    details = {"format": "gguf", "family": "llama", "parameter_size": "8B", "context_length": 4096}
    shape = {"name": name, "model": name, "digest": DIGEST, "size": 7, "details": details}
    able = ["completion", "embedding", "tools", "thinking", "vision", "audio"]
    return {**shape, "modified_at": "2026-01-01T00:00:00Z", "capabilities": able, **more}


class Hostile:
    """Sends `answers[path]`, else the answer of a correct server.

    `endless` is repeated after an answer of `endless_at`; the paths in `hangs` are never answered.
    """

    def __init__(self) -> None:
        self.answers: dict[str, bytes | list[bytes]] = {
            "/": whole(b"Ollama is running", "content-type: text/plain"),
            "/api/version": whole({"version": "0.32.15"}),
            "/api/tags": whole({"models": [entry()]}),
            "/api/ps": whole({"models": []}),
            "/api/show": whole({"capabilities": ["completion"], "model_info": {}}),
            "/api/chat": until_end(lines(text_line("hello"), DONE)),
            "/api/generate": until_end(lines({"model": "m:latest", "response": "hello", "done": True})),
            "/api/embed": whole({"model": "m:latest", "embeddings": [[0.5, 1]]}),
            "/api/pull": until_end(lines({"status": "success"})),
        }
        self.endless = b""
        self.endless_at = ""
        self.hangs: set[str] = set()
        self.pause = 0.0
        self.stays = False
        self.reads_no_body = False
        self.heads: list[bytes] = []
        self.bodies: list[tuple[str, bytes]] = []
        self.sent = 0
        self.gone = asyncio.Event()
        """Set when a client has left an endless answer."""
        self.requested = asyncio.Condition()
        self.url = ""
        self._port = 0
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def count(self, path: str) -> int:
        """The number of requests for a path."""
        return sum(f" {path} ".encode() in head.partition(b"\r\n")[0] for head in self.heads)

    async def wait_for(self, path: str, count: int = 1) -> None:
        """Wait for so many requests for a path. Raises TimeoutError."""
        async with asyncio.timeout(LIMIT), self.requested:
            await self.requested.wait_for(lambda: self.count(path) >= count)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._serve(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ", 2)[1].decode()
        found = _LENGTH.search(head)
        body = await reader.readexactly(int(found[1])) if found and not self.reads_no_body else b""
        async with self.requested:
            self.heads.append(head)
            self.bodies.append((path, body))
            self.requested.notify_all()
        if path in self.hangs or (found and self.reads_no_body):
            await reader.read()
            self.gone.set()
            return
        answer = self.answers.get(path, whole({"error": "no such thing"}, status="404 Not Found"))
        for piece in [answer] if isinstance(answer, bytes) else answer:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(self.pause)  # pieces arrive one by one
        while self.endless and path == self.endless_at:
            writer.write(self.endless)
            await writer.drain()
            self.sent += len(self.endless)
        if self.stays and head.startswith(b"POST"):
            await reader.read()
            self.gone.set()

    async def listen(self) -> None:
        """Start, on the same port as before."""
        self._listener = await asyncio.start_server(self._serve_one, "127.0.0.1", self._port)
        self._port = self._listener.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def die(self) -> None:
        """Stop at once and close all connections."""
        for _ in range(5):  # a closed asyncio server would leave connections open that it is accepting
            await asyncio.sleep(0)
        if self._listener is not None:
            self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Hostile]:
        """A running server."""
        await self.listen()
        try:
            yield self
        finally:
            await self.die()
