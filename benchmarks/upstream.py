"""A stand-in for llama-server: the same HTTP and the same events, without a model behind them.

It takes no processor time to speak of, so that what is measured through it is the plugin: the events of unpaced
streams are made once. Standard library only; the plugin runs it like any llama-server (`--host`, `--port`,
`--version`; other arguments are passed over). A chat's last message, a JSON object, says what the answer is like: see
`Wanted`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from abc import ABC, abstractmethod
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LAST_CHUNK", "Connection", "Wanted", "chunk", "main", "serve", "stream_head"]

_EVENTS_A_WRITE = 8
LAST_CHUNK = b"0\r\n\r\n"
_COMMON: dict[str, Any] = {
    "created": 1700000000,
    "id": "chatcmpl-0123456789abcdefghijklmnopqrstuv",
    "model": "stand-in",
    "system_fingerprint": "b0-0",
    "object": "chat.completion.chunk",
}
_USAGE = {"completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}


def stream_head(content_type: str) -> bytes:
    """What stands before a stream's chunks."""
    return f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()


def chunk(data: bytes) -> bytes:
    """HTTP's framing of a piece."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    shape = json.dumps({"choices": choices, **_COMMON, **more}, separators=(",", ":"))
    return chunk(f"data: {shape}\n\n".encode())


_LAST = _event([{"finish_reason": "length", "index": 0, "delta": {}}])
_LAST_USAGE = _event([], usage=_USAGE)
_END = chunk(b"data: [DONE]\n\n") + LAST_CHUNK


class Wanted(NamedTuple):
    """What a chat is to be answered with."""

    tokens: int = 1
    length: int = 0
    """The characters of each token; 0: it is its number."""
    interval_ms: float = 0
    """Between two tokens; 0: all leave at once."""
    delay_ms: float = 0
    """Before the first token of a paced stream."""
    padding: str = ""
    """Makes the request longer."""

    @classmethod
    def by(cls, request: dict[str, Any]) -> Wanted:
        """What the last message of a request says; a single token when it is no JSON object."""
        said = request["messages"][-1]["content"] if request.get("messages") else ""
        return cls(**json.loads(said)) if said.startswith("{") else cls()


class Connection(asyncio.Protocol, ABC):
    """One connection, one request at a time. What it says to one is a subclass's: `answer` and these two."""

    head: bytes
    """That of a stream's answer."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._missing = 0
        self._next: asyncio.Handle | None = None
        self._paused = False
        self._sent = 0
        self._wanted = Wanted()
        self._due = 0.0
        self._end = b""
        self._transport: asyncio.Transport

    @abstractmethod
    def answer(self, path: str, request: dict[str, Any], /) -> None:
        """Call `whole` or `begin`."""

    @staticmethod
    @abstractmethod
    def token(text: str, /) -> bytes:
        """The chunk of a token with this text."""

    def whole(self, body: bytes, status: int = 200) -> None:
        """Answer in one piece."""
        self._transport.write(b"HTTP/1.1 %d -\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    def begin(self, wanted: Wanted, end: bytes) -> None:
        """Answer with these tokens, then `end`."""
        self._wanted, self._end, self._sent = wanted, end, 0
        if wanted.interval_ms:
            self._transport.write(self.head)
            self._due = self._loop.time() + wanted.delay_ms / 1000
            self._next = self._loop.call_at(self._due, self._paced)
        else:
            self._burst(self.head)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._missing -= len(data)
        if self._missing > 0:
            return
        ends = self._received.find(b"\r\n\r\n") + 4
        if ends < 4:
            return
        first, *others = bytes(self._received[:ends]).strip().split(b"\r\n")
        fields = dict(line.lower().split(b":", 1) for line in others)
        length = int(fields.get(b"content-length", b"0"))
        self._missing = ends + length - len(self._received)
        if self._missing > 0:
            return
        body = self._received[ends : ends + length]
        del self._received[: ends + length]
        self.answer(first.split(b" ")[1].decode(), json.loads(body) if body else {})

    def connection_lost(self, _exc: Exception | None) -> None:
        if self._next is not None:
            self._next.cancel()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._sent < self._wanted.tokens and not self._wanted.interval_ms:
            self._burst()

    def _burst(self, before: bytes = b"") -> None:
        """Send some tokens of an unpaced stream; the next leave when every other stream had its turn."""
        first, self._sent = self._sent, min(self._sent + _EVENTS_A_WRITE, self._wanted.tokens)
        self._write(before + _tokens(self.token, first, self._sent, self._wanted.length))
        if self._sent < self._wanted.tokens and not self._paused:
            self._next = self._loop.call_soon(self._burst)

    def _paced(self) -> None:
        text = f" {self._sent} sent {time.monotonic_ns()}"
        self._sent += 1
        self._write(self.token(text))
        if self._sent < self._wanted.tokens:
            self._due += self._wanted.interval_ms / 1000
            self._next = self._loop.call_at(self._due, self._paced)

    def _write(self, data: bytes) -> None:
        self._transport.write(data if self._sent < self._wanted.tokens else data + self._end)


@cache
def _tokens(token: Callable[[str], bytes], first: int, end: int, length: int) -> bytes:
    """The chunks of some tokens of an unpaced stream."""
    texts = ("x" * length or f" {number}" for number in range(first, end))
    return b"".join(token(text) for text in texts)


class _LlamaServer(Connection):
    head = stream_head("text/event-stream")

    def answer(self, _path: str, request: dict[str, Any], /) -> None:
        if request.get("stream"):
            wants_usage = (request.get("stream_options") or {}).get("include_usage")
            self.begin(Wanted.by(request), _LAST + (_LAST_USAGE if wants_usage else b"") + _END)
        else:
            self.whole(_whole(Wanted.by(request)))

    @staticmethod
    def token(text: str, /) -> bytes:
        return _event([{"finish_reason": None, "index": 0, "delta": {"content": text}}])


def _whole(wanted: Wanted) -> bytes:
    message = {"content": "x" * (wanted.tokens * wanted.length), "role": "assistant"}
    choice = {"finish_reason": "length", "index": 0, "text": "", "message": message}
    return json.dumps({**_COMMON, "status": "ok", "choices": [choice], "usage": _USAGE}).encode()


async def serve(
    connection: type[Connection], host: str, port: int, listening: Callable[[int], None] | None = None
) -> None:
    """Serve until cancelled;

    `listening` is called with the port. A `host` that ends in .sock is a unix socket's path.
    """
    loop = asyncio.get_running_loop()
    if host.endswith(".sock"):
        server = await loop.create_unix_server(connection, host, backlog=256)
    else:
        server = await loop.create_server(connection, host, port, backlog=256)
    async with server:
        if listening is not None:
            listening(server.sockets[0].getsockname()[1])
        await server.serve_forever()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", action="version", version="version: 0 (stand-in)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    arguments, _others = parser.parse_known_args()
    asyncio.run(serve(_LlamaServer, arguments.host, arguments.port))


if __name__ == "__main__":
    main()
