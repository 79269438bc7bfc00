"""Server-sent events to one client, written directly from the worker's frames.

No task runs per token: the link calls `part` and `flush`, and `flush` writes to the socket. The request's own task
only waits for the first frame, for the end, and for a slow client. Unsent text of a slow client is joined and kept up
to a limit, while other streams continue.
"""

from __future__ import annotations

import asyncio
import traceback
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from aiohttp import HttpVersion11, web

from openvino_server.errors import RequestError

if TYPE_CHECKING:
    from openvino_server.link import Worker

__all__ = ["DONE", "EventStream"]

DONE = b"data: [DONE]\n\n"
_HIGH = 256 * 1024
"""Bytes that may wait in the socket's buffer before a stream pauses."""
_KEPT = 4 * 1024 * 1024
"""Characters that may wait for a paused stream. A longer answer does not fit any model's context: the call is
ended."""
_COMPACT_EVERY = 64


class EventStream(ABC):
    """The answer to one streamed request, a `Sink`. Subclasses write the events."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._events: list[Any] = []
        self._attention = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._chunked = request.version >= HttpVersion11
        self._behind = False
        self._compacted = 0
        self._result: dict[str, Any] | None = None
        self._error: RequestError | None = None
        self._closed = False

    async def run(self, worker: Worker, call: dict[str, Any]) -> web.StreamResponse:
        """Make the call and write its events. Raises RequestError if it fails before the first one."""
        number = worker.submit(call, self)
        try:
            await self._attention.wait()
            if self._error is not None and not self._events:
                raise self._error
            response = web.StreamResponse(
                headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
            )
            if self._chunked:
                response.enable_chunked_encoding()
            writer = await response.prepare(self._request)
            self._transport = self._request.transport
            self.flush()
            while writer is not None and not self._closed:
                await self._attention.wait()
                self._attention.clear()
                if self._behind:
                    await writer.drain()
                    self._behind = False
                    self.flush()
            await response.write_eof()
            return response
        finally:
            worker.cancel(number)

    @abstractmethod
    def render(self, events: list[Any]) -> bytes:
        """The events as SSE."""

    @abstractmethod
    def closing(self, result: dict[str, Any]) -> bytes:
        """The events at the end of a successful stream."""

    # Sink

    def part(self, payload: list[Any]) -> None:
        if self._closed:
            return
        self._events += payload
        if self._behind and len(self._events) - self._compacted > _COMPACT_EVERY:
            self._compact()

    def progress(self, step: int, total: int) -> None:
        self._events.append((step, total))

    def done(self, payload: dict[str, Any]) -> None:
        self._result = payload

    def failed(self, error: RequestError) -> None:
        self._error = error

    def flush(self) -> None:
        transport = self._transport
        if transport is None:
            self._attention.set()
            return
        if self._behind or self._closed:
            return
        if transport.is_closing():
            self._events.clear()
            self._close()
            return
        if transport.get_write_buffer_size() > _HIGH:
            self._behind = True
            self._attention.set()
            return
        self._write(transport)

    def _write(self, transport: asyncio.Transport) -> None:
        data = b""
        events, self._events = self._events, []
        self._compacted = 0
        if events:
            try:
                data = self.render(events)
            except Exception as error:  # noqa: BLE001  # other streams must still be written
                traceback.print_exc()
                self._error = RequestError(f"the worker's answer cannot be encoded: {error}", 500)
        if self._error is not None:
            data += b"data: " + self._error.body() + b"\n\n"
        elif self._result is not None:
            data += self.closing(self._result)
        if data:
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        if self._error is not None or self._result is not None:
            self._close()

    def _close(self) -> None:
        self._closed = True
        self._attention.set()

    def _compact(self) -> None:
        """Join consecutive text events; end a stream that exceeds the limit."""
        kept: list[Any] = []
        texts: dict[int, list[str]] = {}
        size = 0

        def join(index: int) -> None:
            pieces = texts.pop(index, [])
            if pieces:
                kept.append((index, "".join(pieces), 0, None, None))

        for event in self._events:
            index, delta, _, logprobs, finish = event
            if isinstance(delta, str) and logprobs is None and finish is None:
                texts.setdefault(index, []).append(delta)
                size += len(delta)
            else:
                join(index)
                kept.append(event)
                size += 512 * (1 + len(logprobs or ()))
        for index in list(texts):
            join(index)
        self._events = kept
        self._compacted = len(kept)
        if size > _KEPT and self._transport is not None:
            self._events = []
            self._close()
            self._transport.abort()  # which cancels the request's task, and so the call
