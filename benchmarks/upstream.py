"""A stand-in for llama-server: the same HTTP and the same events, without a model behind them.

It takes no processor time to speak of, so that what is measured through it is the plugin. Standard library only; the
plugin runs it like any llama-server (`--host`, `--port`, `--version`; other arguments are passed over). A request's
`max_tokens` says how many events come, all at once or paced: that is said by a last message that is JSON,
{"interval_ms", "delay_ms"}. Paced events carry `sent`, the monotonic clock in nanoseconds when they left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LAST_CHUNK", "Connection", "chunk", "main", "pace", "serve", "stream_head"]

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


def _token(**more: Any) -> bytes:
    return _event([{"finish_reason": None, "index": 0, "delta": {"content": " token"}}], **more)


_LAST = _event([{"finish_reason": "length", "index": 0, "delta": {}}])
_LAST_USAGE = _event([], usage=_USAGE)
_END = chunk(b"data: [DONE]\n\n") + LAST_CHUNK
_CHOICE = {"finish_reason": "length", "index": 0, "text": "", "message": {"content": "", "role": "assistant"}}
_WHOLE = json.dumps({**_COMMON, "status": "ok", "choices": [_CHOICE], "usage": _USAGE}).encode()


def pace(request: dict[str, Any]) -> tuple[float, float]:
    """The seconds between the tokens that a chat is to be answered with, and before the first one."""
    said = request["messages"][-1]["content"]
    wanted = json.loads(said) if said.startswith("{") else {}
    return float(wanted.get("interval_ms", 0)) / 1000, float(wanted.get("delay_ms", 0)) / 1000


class Connection(asyncio.Protocol, ABC):
    """One connection, one request at a time. What it says to one is a subclass's: `answer` and these three."""

    head: bytes
    """That of a stream's answer."""
    token: bytes
    """A token's chunk."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._next: asyncio.Handle | None = None
        self._paused = False
        self._left = 0
        self._interval = 0.0
        self._due = 0.0
        self._end = b""
        self._tokens = self.token * _EVENTS_A_WRITE
        self._transport: asyncio.Transport

    @abstractmethod
    def answer(self, path: str, request: dict[str, Any], /) -> None:
        """Call `whole` or `begin`."""

    @abstractmethod
    def stamped(self) -> bytes:
        """A token's chunk with the time at which it leaves."""

    def whole(self, body: bytes) -> None:
        """Answer in one piece."""
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    def begin(self, tokens: int, end: bytes, interval: float, delay: float) -> None:
        """Answer with so many tokens, then `end`.

        All at once, or one each `interval` seconds, the first after `delay`.
        """
        self._left, self._end, self._interval = max(1, tokens), end, interval
        if interval:
            self._transport.write(self.head)
            self._due = self._loop.time() + delay
            self._next = self._loop.call_at(self._due, self._paced)
        else:
            first = min(self._left, _EVENTS_A_WRITE)
            self._write(self.head + self.token * first, first)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = bytes(self._received).partition(b"\r\n\r\n")
        if not found:
            return
        first, *others = head.split(b"\r\n")
        fields = dict(line.lower().split(b":", 1) for line in others)
        length = int(fields.get(b"content-length", b"0"))
        if len(rest) < length:
            return
        del self._received[: len(head) + 4 + length]
        self.answer(first.split(b" ")[1].decode(), json.loads(rest[:length]) if length else {})

    def connection_lost(self, _exc: Exception | None) -> None:
        if self._next is not None:
            self._next.cancel()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._left and not self._interval:
            self._burst()

    def _write(self, data: bytes, tokens: int) -> None:
        """Send some tokens of an unpaced stream; the next leave when every other stream had its turn."""
        self._left -= tokens
        self._transport.write(data if self._left else data + self._end)
        if self._left and not self._paused:
            self._next = self._loop.call_soon(self._burst)

    def _burst(self) -> None:
        if self._left >= _EVENTS_A_WRITE:
            self._write(self._tokens, _EVENTS_A_WRITE)
        elif self._left:
            self._write(self.token * self._left, self._left)

    def _paced(self) -> None:
        self._left -= 1
        data = self.stamped()
        self._transport.write(data if self._left else data + self._end)
        if self._left:
            self._due += self._interval
            self._next = self._loop.call_at(self._due, self._paced)


class _LlamaServer(Connection):
    head = stream_head("text/event-stream")
    token = _token()

    def answer(self, _path: str, request: dict[str, Any], /) -> None:
        if not request.get("stream"):
            self.whole(_WHOLE)
            return
        wants_usage = (request.get("stream_options") or {}).get("include_usage")
        end = _LAST + (_LAST_USAGE if wants_usage else b"") + _END
        self.begin(int(request.get("max_tokens", 1)), end, *pace(request))

    def stamped(self) -> bytes:
        return _token(sent=time.monotonic_ns())


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
