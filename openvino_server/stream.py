"""Server-sent events to one client, written directly from the worker's frames.

No task runs per token: the link calls `part` and `flush`, and `flush` writes to the socket. The request's own task
only waits for the first frame, for the end, and for a slow client. Unsent events of a slow client are kept up to a
limit, while other streams continue.
"""

from __future__ import annotations

import asyncio
import traceback
from typing import TYPE_CHECKING, Any

from aiohttp import HttpVersion11, web

from openvino_server.errors import RequestError
from openvino_server.sinks import Sink

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvino_server.link import Worker

__all__ = ["EventStream"]

_HIGH = 256 * 1024
"""Bytes in the socket's buffer above which further events are kept here."""
_KEPT = 16 * 1024 * 1024
"""Bytes that may be kept for a client that does not read, such as the events of 70,000 tokens. Then the call is
ended."""


class EventStream(Sink):
    """The answer to one streamed request.

    `render` makes server-sent events of the parts that have arrived, `closing` those at the end of a successful call.
    """

    def __init__(
        self,
        request: web.Request,
        render: Callable[[list[Any]], bytes],
        closing: Callable[[dict[str, Any]], bytes],
    ) -> None:
        self._request = request
        self._render = render
        self._closing = closing
        self._parts: list[Any] = []
        """Those that have arrived since the last `flush`."""
        self._events = bytearray()
        """Those that have not been written to the socket."""
        self._attention = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._chunked = request.version >= HttpVersion11
        self._behind = False
        self._result: dict[str, Any] | None = None
        self._error: RequestError | None = None
        self._complete = False
        """Whether the last event is in `_events`, or has been written."""
        self._closed = False

    async def run(self, worker: Worker, call: dict[str, Any]) -> web.StreamResponse:
        """Make the call and write its events. Raises RequestError if it fails before the first one."""
        number = worker.submit(call, self)
        try:
            await self._attention.wait()
            if self._error is not None and not self._parts:
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

    # Sink

    def part(self, payload: list[Any]) -> None:
        if not self._closed:
            self._parts += payload

    def done(self, payload: dict[str, Any]) -> None:
        self._result = payload

    def failed(self, error: RequestError) -> None:
        self._error = error

    def flush(self) -> None:
        transport = self._transport
        if transport is None:
            self._attention.set()
            return
        if transport.is_closing():
            self._close()
        if self._closed:
            return
        self._make_events()
        if self._behind:
            if len(self._events) > _KEPT:
                self._close()
                transport.abort()  # which cancels the request's task, and so the call
        elif transport.get_write_buffer_size() > _HIGH:
            self._behind = True
            self._attention.set()
        else:
            self._write(transport)

    def _make_events(self) -> None:
        """Make events of what has arrived."""
        parts, self._parts = self._parts, []
        try:
            if parts:
                self._events += self._render(parts)
        except Exception as error:  # noqa: BLE001  # other streams must still be written
            traceback.print_exc()
            self._error = RequestError(f"the worker's answer cannot be encoded: {error}", 500)
        if self._complete:
            return
        if self._error is not None:
            self._events += b"data: " + self._error.body() + b"\n\n"
        elif self._result is not None:
            self._events += self._closing(self._result)
        self._complete = self._error is not None or self._result is not None

    def _write(self, transport: asyncio.Transport) -> None:
        data = bytes(self._events)
        self._events.clear()
        if data:
            transport.write(b"".join((b"%x\r\n" % len(data), data, b"\r\n")) if self._chunked else data)
        if self._complete:
            self._close()

    def _close(self) -> None:
        self._closed = True
        self._attention.set()
