"""HTTP/2 connections over asyncio, for servers and clients, on the sans-I/O core `ngh2` (libnghttp2).

A `Connection` is an asyncio protocol. It feeds received bytes to the core, passes what arrives to the `Stream`
concerned, and writes what the core has to send: at once after a pause, otherwise at the end of this turn of the event
loop. A token that comes alone leaves without another turn, and those that come together leave in one write.

Flow control follows consumption: a stream acknowledges bytes when its reader has taken them (`Stream.consumed`), so a
slow reader stops its own sender after one window, and no other stream. A writer waits in `Stream.writable` while much
of its stream is queued, or the transport is full.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import ngh2
from ngh2 import Setting, events

from engine_plugin.rpc.frames import ClientFrames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Headers: TypeAlias = tuple[tuple[bytes, bytes], ...]

__all__ = ["Connection", "Stream", "StreamEnded"]

_WINDOW = 1 << 20
"""Bytes that a peer may send on a stream before its reader takes them."""

_ACKNOWLEDGED = _WINDOW >> 3
"""Bytes that its reader takes before they are acknowledged together."""

_QUEUED = 256 << 10
"""Bytes queued on a stream above which its writer waits."""

_WRITTEN = 256 << 10
"""Bytes taken from the core at a time, so that a full transport stops a long message."""

_PAUSE = 0.0002
"""Seconds without a write after which the next one is not delayed."""

_LARGEST = (1 << 31) - 1
_LINGER = 1.0  # seconds for the peer to read the last bytes and close

_SETTINGS = {
    Setting.MAX_CONCURRENT_STREAMS: 10_000,
    Setting.INITIAL_WINDOW_SIZE: _WINDOW,
    Setting.MAX_HEADER_LIST_SIZE: 64 << 10,
}
_CONFIGURATION = ngh2.Configuration(
    auto_window_update=False,
    peer_max_concurrent_streams=_LARGEST,
    # Beyond these the connection ends; for more than MAX_HEADER_LIST_SIZE, which grpcio does not heed, it need not.
    max_inbound_header_list_size=1 << 20,
    max_inbound_header_count=16 << 10,
    max_continuations=64,
    # Peers are programs of this user, which may abandon thousands of calls at once.
    stream_reset_rate_limit=(1_000_000, 100_000),
)
_ENDED = (ngh2.StreamProtocolError, ngh2.ConnectionStateError, ngh2.ConnectionClosingError)
"""The core knows of the end of the stream, or of the connection; its event follows."""


class StreamEnded(Exception):  # noqa: N818  # the peer may have ended it
    """The stream takes no more bytes."""


class Stream:
    """One stream of a connection. Subclasses implement the methods `on_…`, which the connection calls.

    What is sent after the end of the stream is dropped; `on_closed` reports that end.
    """

    __slots__ = ("_held", "_room", "_taken", "closed", "connection", "id")

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection = connection
        self.id = number
        self.closed = False
        self._held = 0  # bytes received and not acknowledged
        self._taken = 0  # of these, bytes that the reader has taken
        self._room: asyncio.Future[None] | None = None

    def on_headers(self, headers: Headers, *, ended: bool) -> None:
        """Take the head of the request (server) or of the response (client). `ended`: no body follows."""
        raise NotImplementedError

    def on_data(self, data: bytes, *, ended: bool) -> None:
        """Take bytes of the body; the reader acknowledges them by `consumed`."""
        raise NotImplementedError

    def on_trailers(self, headers: Headers) -> None:
        """Take the trailers, with which the peer's side ends."""
        raise NotImplementedError

    def on_closed(self, code: int | None) -> None:
        """Take note of the end: 0 when both sides finished, a code after a reset, None if the connection ended."""
        raise NotImplementedError

    def send_headers(self, headers: Iterable[tuple[bytes, bytes]], *, end: bool = False) -> None:
        """Send the head of a response (server). Unless it is the end, it leaves with the body or the trailers."""
        with suppress(*_ENDED):
            self.connection.core.send_response(self.id, headers, end_stream=end)
        if end:
            self.connection.flush_soon()

    def send_data(self, data: bytes, *, end: bool = False, more: bool = False) -> None:
        """Queue bytes of the body; a writer of many awaits `writable` in between.

        With `more` they leave with what the caller sends next.
        """
        if self.closed:
            return
        try:
            self.connection.core.send_data(self.id, data, end_stream=end)
        except _ENDED:
            return
        if not more:
            self.connection.flush_soon()

    def send_trailers(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Finish this side with trailers (server)."""
        with suppress(*_ENDED):
            self.connection.core.send_trailers(self.id, headers)
        self.connection.flush_soon()

    def finish(self) -> None:
        """Finish this side without trailers (client)."""
        with suppress(*_ENDED):
            self.connection.core.end_stream(self.id)
        self.connection.flush_soon()

    def reset(self, code: int) -> None:
        """Abandon the stream with an HTTP/2 error code. Idempotent."""
        if not self.closed:
            with suppress(*_ENDED):
                self.connection.core.reset_stream(self.id, code)
            self.connection.flush_soon()

    @property
    def full(self) -> bool:
        """Whether a writer should wait before it sends more."""
        connection = self.connection
        return connection.paused or connection.core.queued_body_size(self.id) > _QUEUED

    async def writable(self) -> None:
        """Wait until the stream is not full. Raises StreamEnded."""
        while not self.closed and self.full:
            self._room = self.connection.loop.create_future()
            self.connection.writers.add(self)
            try:
                await self._room
            finally:
                self.connection.writers.discard(self)
        if self.closed:
            raise StreamEnded

    def consumed(self, amount: int | None = None) -> None:
        """Let the peer send as many more bytes as the reader has taken: at most those that arrived, None for all."""
        self._taken = self._held if amount is None else min(self._taken + amount, self._held)
        if self._taken >= _ACKNOWLEDGED and not self.closed:
            self.connection.acknowledge(self.id, self._taken)
            self._held -= self._taken
            self._taken = 0
            self.connection.flush_soon()

    # Called by the connection

    def received(self, data: bytes, *, ended: bool) -> None:
        """Pass on bytes of the body."""
        self._held += len(data)
        self.on_data(data, ended=ended)

    def end(self, code: int | None) -> None:
        """End the stream. Bytes that its reader has not taken count no longer. Idempotent."""
        if self.closed:
            return
        self.closed = True
        if self._held and code is not None:
            self.connection.acknowledge(self.id, self._held)
        self._held = self._taken = 0
        self.wake()
        self.on_closed(code)

    def wake(self) -> None:
        """Let a waiting writer look again."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)


_S = TypeVar("_S", bound=Stream)


class Connection(asyncio.Protocol):
    """One connection.

    A server's calls `accept` for each request, which returns its stream, or answers by `refuse` and returns None.
    `lost` is called once, at the end of the connection.
    """

    transport: asyncio.Transport  # from `connection_made` on

    def __init__(
        self,
        role: ngh2.Role,
        *,
        accept: Callable[[Connection, int, Headers], Stream | None] | None = None,
        lost: Callable[[Connection], None] = lambda _connection: None,
    ) -> None:
        self.core = ngh2.Connection(role, _CONFIGURATION)
        self.streams: dict[int, Stream] = {}
        self.writers: set[Stream] = set()
        """Streams whose writers wait."""
        self.paused = False
        """Whether the transport is full."""
        self.going_away = False
        """Whether the peer takes no more requests."""
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self.loop.create_future()
        """Done when the transport is closed."""
        self._accept = accept
        self._lost = lost
        self._frames = ClientFrames(self.core) if role is ngh2.Role.SERVER else None
        self._flushing = False  # a flush is about to come
        self._written = 0.0  # when something was, by the event loop's clock
        self._events: list[events.Event] = []  # of the core, to be handled
        self._made = False  # it has its transport
        self._over = False

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._made = True
        if self._over:  # ended by its owner before
            self.transport.abort()
            return
        self.core.initiate_connection(_SETTINGS)
        self.core.set_local_window_size(_LARGEST)  # streams have windows of their own
        self.flush()

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        core, error = self.core, None
        self._flushing = True  # below
        try:
            if self._frames is not None:
                data, error = self._frames.admit(data)
            core.receive_data(data)
            self._handle_events()
        except ngh2.NGH2Error:  # not HTTP/2, or beyond a limit: the core has nothing more to say
            self.close()
            return
        if error is not None:
            with suppress(*_ENDED):
                core.terminate_connection(error)
            self.close()
        else:
            self.flush()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.flush()

    def eof_received(self) -> None:
        """End the calls: a peer that closes its side is gone. gRPC's clients and servers never close only one."""
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self._over = self.going_away = True
        self._end_streams()
        if not self.ended.done():  # a wait for it was cancelled
            self.ended.set_result(None)
        self._lost(self)

    # Called by the owner and the streams

    def request(self, headers: Iterable[tuple[bytes, bytes]], stream: Callable[[Connection, int], _S]) -> _S:
        """Begin a request (client), which leaves with its body or at a flush.

        Raises StreamEnded when the connection takes no more.
        """
        try:
            if self.going_away or not self.core.can_send_request:
                raise StreamEnded
            number = self.core.send_request(headers)
        except ngh2.NGH2Error as error:
            raise StreamEnded from error
        begun = stream(self, number)
        self.streams[number] = begun
        return begun

    def refuse(self, number: int, headers: Iterable[tuple[bytes, bytes]], body: bytes = b"") -> None:
        """Answer a request without a stream (server)."""
        with suppress(*_ENDED):
            self.core.send_response(number, headers, end_stream=not body)
            if body:
                self.core.send_data(number, body, end_stream=True)

    def acknowledge(self, number: int, amount: int) -> None:
        """Open the windows of a stream, which may have ended, and of the connection by `amount` bytes."""
        with suppress(*_ENDED):
            self.core.acknowledge_received_data(amount, number)

    def go_away(self) -> None:
        """Refuse new requests; running ones continue (server)."""
        if not self._made:
            self.abort()
        elif not self._over:
            with suppress(*_ENDED):
                self.core.send_goaway()
            self.flush()

    def close(self) -> None:
        """End all streams and close the connection after what is queued. Idempotent.

        The peer's last bytes are still read: a socket that closes with unread bytes resets the connection, and the
        peer loses what was sent last.
        """
        if self._over:
            return
        with suppress(*_ENDED):
            self._write()
        self._over = self.going_away = True
        self._end_streams()
        if self.transport.can_write_eof():
            with suppress(OSError):  # the peer has closed the connection
                self.transport.write_eof()
            self.loop.call_later(_LINGER, self.transport.abort)
        else:
            self.transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._over = self.going_away = True
        self._end_streams()
        if self._made:
            self.transport.abort()

    def flush_soon(self) -> None:
        """Write what the core has to send: at once after a pause, else at the end of this turn of the event loop."""
        if self._flushing or self._over:
            return
        if self.loop.time() - self._written > _PAUSE:
            self._write()
            self._events += self.core.events()
            if not self._events:
                return
        self._flushing = True
        self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what the core has to send, until the transport is full."""
        self._flushing = False
        if self._over:
            return
        self._write()
        self._handle_events()  # what was written may have ended streams, or the connection
        if not (self._over or self.core.want_read or self.core.want_write):
            self.close()
        if self.writers and not self.paused:
            for stream in list(self.writers):
                if stream.closed or not stream.full:
                    stream.wake()

    def _write(self) -> None:
        while not self.paused and (data := self.core.data_to_send(_WRITTEN)):
            self.transport.write(data)
            self._written = self.loop.time()

    def _end_streams(self) -> None:
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.end(None)

    # Events of the core

    def _handle_events(self) -> None:
        arrived, self._events = [*self._events, *self.core.events()], []
        for event in arrived:
            handle = _HANDLERS.get(type(event))
            if handle is not None:
                handle(self, event)

    def _headers(self, event: events.RequestReceived | events.ResponseReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is None and self._accept is not None:
            stream = self._accept(self, event.stream_id, event.headers)
            if stream is not None:
                self.streams[event.stream_id] = stream
        if stream is not None:
            stream.on_headers(event.headers, ended=event.end_stream)

    def _data(self, event: events.DataReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.received(event.data, ended=event.end_stream)
        else:
            self.acknowledge(event.stream_id, len(event.data))

    def _trailers(self, event: events.TrailersReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.on_trailers(event.headers)

    def _ended(self, event: events.StreamClosed | events.StreamReset) -> None:
        stream = self.streams.pop(event.stream_id, None)
        if stream is not None:
            stream.end(event.error_code)

    def _goaway(self, _event: events.GoAwayReceived) -> None:
        self.going_away = True

    def _closed(self, _event: events.ConnectionClosed) -> None:
        self.close()


_HANDLERS: dict[type, Callable[[Connection, Any], None]] = {
    events.DataReceived: Connection._data,
    events.RequestReceived: Connection._headers,
    events.ResponseReceived: Connection._headers,
    events.TrailersReceived: Connection._trailers,
    events.StreamClosed: Connection._ended,
    events.StreamReset: Connection._ended,
    events.GoAwayReceived: Connection._goaway,
    events.ConnectionClosed: Connection._closed,
}
