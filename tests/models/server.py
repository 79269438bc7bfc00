"""A real HTTP server on loopback that misbehaves as it is told, one script a request."""

from __future__ import annotations

import asyncio
import base64
import re
from collections import deque
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

    import pytest

__all__ = ["FileServer", "Request", "Script", "file_server", "without_proxies"]

_TURNS = 5
"""Turns of the loop from one who comes to `connected`, and one to spare: meanwhile only the loop knows of him."""


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]

    @property
    def range(self) -> str:
        return self.headers.get("range", "")


@dataclass
class Script:
    """How one request is answered. Without any field set, correctly."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    length: int | None = None
    """A Content-Length that may lie."""
    ignore_range: bool = False
    chunked: bool = False
    drop_after: int | None = None
    """Bytes of the body after which the connection is cut; 0 cuts before the head."""
    stall_after: int | None = None
    """Bytes of the body after which nothing comes until `go` is set, then the rest."""
    go: asyncio.Event = field(default_factory=asyncio.Event)


class FileServer:
    """Serves `data` at every path, with Range, If-Range and ETag, unless a script says otherwise.

    `files` holds what other paths have; None: no such file. Their requests take no script.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.etag = '"version-1"'
        self.last_modified = ""
        self.headers: dict[str, str] = {}
        self.credentials: tuple[str, str] | None = None
        self.redirects: dict[str, str] = {}
        self.files: dict[str, bytes | None] = {}
        self.scripts: deque[Script] = deque()
        self.requests: list[Request] = []
        self.sent = 0
        self.port = 0
        self.scheme = "http"
        self._connections: set[asyncio.Task[None]] = set()

    def url(self, path: str = "/model.gguf", credentials: str = "") -> str:
        return f"{self.scheme}://{credentials}127.0.0.1:{self.port}{path}"

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one who came. No coroutine: a task that is cancelled before it began closes nothing."""
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._connections.discard(task)
            writer.close()

        task.add_done_callback(ended)

    async def close_connections(self) -> None:
        """To be called before the server is closed: the loop would lose whom it is just letting in."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        for task in list(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(set(self._connections))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):  # a client may leave before it asks
            await self._answer_one(reader, writer)
            writer.close()
            await writer.wait_closed()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        request = Request(head[0].split(" ")[1], {key.lower(): value for key, value in headers.items()})
        self.requests.append(request)
        await self.answer(writer, request)

    async def answer(self, writer: asyncio.StreamWriter, request: Request) -> None:
        if not self._authorized(request):
            await self.send(writer, Script(status=401, body=b"who are you?", headers={"WWW-Authenticate": "Basic"}))
        elif request.path in self.redirects:
            location = {"Location": self.redirects[request.path], **self.headers}
            await self.send(writer, Script(status=302, body=b"", headers=location))
        elif request.path in self.files:
            content = self.files[request.path]
            await self.send(writer, Script(status=404 if content is None else 200, body=content or b""))
        else:
            await self.file(writer, request, self.scripts.popleft() if self.scripts else Script())

    def _authorized(self, request: Request) -> bool:
        if self.credentials is None:
            return True
        pair = base64.b64encode(":".join(self.credentials).encode()).decode()
        return request.headers.get("authorization") == f"Basic {pair}"

    async def file(self, writer: asyncio.StreamWriter, request: Request, script: Script) -> None:
        if script.status:
            await self.send(writer, script)
            return
        data, etag = self.content(request)
        headers = {"Content-Type": "application/octet-stream", **self.headers}
        headers |= {"ETag": etag} if etag else {}
        headers |= {"Last-Modified": self.last_modified} if self.last_modified else {}
        status, body = 200, data
        wanted = re.fullmatch(r"bytes=(\d+)-", request.range)
        if wanted and not script.ignore_range and request.headers.get("if-range", etag) in {etag, self.last_modified}:
            start = int(wanted[1])
            if start < len(data):
                status, body = 206, data[start:]
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            else:
                status, body = 416, b""
                headers["Content-Range"] = f"bytes */{len(data)}"
        script.status = status
        script.body = body if script.body is None else script.body
        script.headers = {**headers, **script.headers}
        await self.send(writer, script)

    def content(self, request: Request) -> tuple[bytes, str]:
        """The file at a path, and its ETag."""
        return self.data, self.etag

    async def send(self, writer: asyncio.StreamWriter, script: Script) -> None:
        if script.drop_after == 0:
            return
        body = script.body or b""
        headers = {"Connection": "close", **script.headers}
        if script.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(len(body) if script.length is None else script.length)
        lines = [f"HTTP/1.1 {script.status} Scripted", *(f"{key}: {value}" for key, value in headers.items())]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        cut = len(body) if script.drop_after is None else min(script.drop_after, len(body))
        stop = cut if script.stall_after is None else min(script.stall_after, cut)
        await self._body(writer, body[:stop], script)
        if script.stall_after is not None:
            await script.go.wait()
            await self._body(writer, body[stop:cut], script)
        if script.chunked and script.drop_after is None:
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    async def _body(self, writer: asyncio.StreamWriter, data: bytes, script: Script) -> None:
        if data:
            writer.write(b"%x\r\n%b\r\n" % (len(data), data) if script.chunked else data)
            await writer.drain()
            self.sent += len(data)


@asynccontextmanager
async def file_server(data: bytes, tls: ssl.SSLContext | None = None) -> AsyncIterator[FileServer]:
    files = FileServer(data)
    files.scheme = "https" if tls else "http"
    server = await asyncio.start_server(files.connected, "127.0.0.1", 0, ssl=tls)
    files.port = server.sockets[0].getsockname()[1]
    try:
        yield files
    finally:
        await files.close_connections()
        server.close()
        await server.wait_closed()


def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands between us and the server."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
