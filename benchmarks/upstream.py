"""A stand-in for llama-server: the same HTTP and the same events, without a model behind them.

It takes no processor time to speak of, so that what is measured through it is the plugin. Standard library only; the
plugin runs it like any llama-server (`--host`, `--port`, `--version`; other arguments are passed over). A request's
`max_tokens` says how many events come, all at once or, with `interval_ms`, paced, the first after `delay_ms`. Paced
events carry `sent`, the monotonic clock in nanoseconds when they left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

__all__ = ["main"]

_EVENTS_A_WRITE = 8
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_COMMON: dict[str, Any] = {
    "created": 1700000000,
    "id": "chatcmpl-0123456789abcdefghijklmnopqrstuv",
    "model": "stand-in",
    "system_fingerprint": "b0-0",
    "object": "chat.completion.chunk",
}
_USAGE = {"completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    shape = json.dumps({"choices": choices, **_COMMON, **more}, separators=(",", ":"))
    return _chunk(f"data: {shape}\n\n".encode())


def _token(**more: Any) -> bytes:
    return _event([{"finish_reason": None, "index": 0, "delta": {"content": " token"}}], **more)


_TOKEN = _token()
_TOKENS = _TOKEN * _EVENTS_A_WRITE
_LAST = _event([{"finish_reason": "length", "index": 0, "delta": {}}])
_LAST_USAGE = _event([], usage=_USAGE)
_END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._next: asyncio.Handle | None = None
        self._paused = False
        self._left = 0
        self._interval = 0.0
        self._due = 0.0
        self._end = _END
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = bytes(self._received).partition(b"\r\n\r\n")
        if not found:
            return
        fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
        length = int(fields.get(b"content-length", b"0"))
        if len(rest) < length:
            return
        del self._received[: len(head) + 4 + length]
        self._answer(json.loads(rest[:length]) if length else {})

    def connection_lost(self, _exc: Exception | None) -> None:
        if self._next is not None:
            self._next.cancel()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._left and not self._interval:
            self._burst()

    def _answer(self, request: dict[str, Any]) -> None:
        if not request.get("stream"):
            choice = {
                "finish_reason": "length",
                "index": 0,
                "text": "",
                "message": {"content": "", "role": "assistant"},
            }
            body = json.dumps({**_COMMON, "status": "ok", "choices": [choice], "usage": _USAGE}).encode()
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            return
        self._left = max(1, int(request.get("max_tokens", 1)))
        self._interval = float(request.get("interval_ms", 0)) / 1000
        wants_usage = (request.get("stream_options") or {}).get("include_usage")
        self._end = _LAST + (_LAST_USAGE if wants_usage else b"") + _END
        if self._interval:
            self._transport.write(_HEAD)
            self._due = self._loop.time() + float(request.get("delay_ms", 0)) / 1000
            self._next = self._loop.call_at(self._due, self._paced)
        else:
            first = min(self._left, _EVENTS_A_WRITE)
            self._write(_HEAD + _TOKEN * first, first)

    def _write(self, data: bytes, tokens: int) -> None:
        """Send some tokens of an unpaced stream; the next leave when every other stream had its turn."""
        self._left -= tokens
        self._transport.write(data if self._left else data + self._end)
        if self._left and not self._paused:
            self._next = self._loop.call_soon(self._burst)

    def _burst(self) -> None:
        if self._left >= _EVENTS_A_WRITE:
            self._write(_TOKENS, _EVENTS_A_WRITE)
        elif self._left:
            self._write(_TOKEN * self._left, self._left)

    def _paced(self) -> None:
        self._left -= 1
        data = _token(sent=time.monotonic_ns())
        self._transport.write(data if self._left else data + self._end)
        if self._left:
            self._due += self._interval
            self._next = self._loop.call_at(self._due, self._paced)


async def _serve(host: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    if host.endswith(".sock"):
        server = await loop.create_unix_server(_Connection, host, backlog=256)
    else:
        server = await loop.create_server(_Connection, host, port, backlog=256)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", action="version", version="version: 0 (stand-in)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    arguments, _others = parser.parse_known_args()
    asyncio.run(_serve(arguments.host, arguments.port))


if __name__ == "__main__":
    main()
