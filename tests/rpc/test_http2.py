"""HTTP/2 connections: flow control, resets, broken frames, and the ends of connections."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import ngh2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ngh2 import events

from engine_plugin.rpc.authority import without_at
from engine_plugin.rpc.http2 import Connection, Stream, StreamEnded
from engine_plugin.server.native import NativeServer
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine_plugin.rpc.http2 import Headers

HEAD = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/x"), (b":authority", b"a"))


class Echo(Stream):
    """Keeps what arrives; consumes it only on demand."""

    def __init__(self, connection: Connection, number: int) -> None:
        super().__init__(connection, number)
        self.body = bytearray()
        self.ends: list[int | None] = []

    def on_headers(self, headers: Headers, *, ended: bool) -> None:
        pass

    def on_data(self, data: bytes, *, ended: bool) -> None:
        self.body += data

    def on_trailers(self, headers: Headers) -> None:
        pass

    def on_closed(self, code: int | None) -> None:
        self.ends.append(code)


class Wire(asyncio.Transport):
    """A transport whose bytes a test carries."""

    def __init__(self) -> None:
        super().__init__()
        self.out = bytearray()
        self.closing = False

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.out += data

    def take(self) -> bytes:
        data, self.out = bytes(self.out), bytearray()
        return data

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self.closing = True

    abort = close


class Pair:
    """A server's connection, and a client that is only the core."""

    def __init__(self, *, greet: bool = True) -> None:
        self.streams: list[Echo] = []
        self.wire = Wire()
        self.server = Connection(ngh2.Role.SERVER, accept=self._accept)
        self.server.connection_made(self.wire)
        self.client = ngh2.Connection(ngh2.Role.CLIENT, ngh2.Configuration(auto_window_update=False))
        if greet:
            self.client.initiate_connection({})
            self.carry()

    def _accept(self, connection: Connection, number: int, _headers: Headers) -> Echo:
        self.streams.append(Echo(connection, number))
        return self.streams[-1]

    def carry(self) -> list[events.Event]:
        """Carry bytes both ways until nothing moves; returns what the client saw."""
        seen: list[events.Event] = []
        while True:
            self.server.flush()
            up, down = self.client.data_to_send(), self.wire.take()
            if up:
                self.server.data_received(up)
            if down:
                self.client.receive_data(down)
                seen += self.client.events()
            if not up and not down:
                return seen

    def request(self, body: bytes = b"", *, end: bool = False) -> int:
        number = self.client.send_request(HEAD)
        self.client.send_data(number, body, end_stream=end)
        self.carry()
        return number


@pytest.mark.promise("G46")
async def test_sender_waits_for_the_reader_of_its_stream_only() -> None:
    pair = Pair()
    pair.request(b"x" * (3 << 20))
    slow = pair.streams[0]
    assert len(slow.body) == 1 << 20, "more than a window was sent"
    pair.request(b"y" * (1 << 20), end=True)
    assert len(pair.streams[1].body) == 1 << 20, "another stream was stopped"
    slow.consumed(1 << 20)
    pair.carry()
    assert len(slow.body) == 2 << 20


@pytest.mark.promise("G43")
async def test_abandoned_streams_do_not_shrink_the_connection() -> None:
    """Bytes that a stream's reader never took are acknowledged at its end."""
    pair = Pair()
    for _ in range(3000):
        number = pair.request(b"x" * (1 << 20))
        assert len(pair.streams[-1].body) == 1 << 20
        pair.client.reset_stream(number)
        pair.carry()
        pair.streams.clear()
    assert not pair.server.streams


@pytest.mark.promise("G46")
async def test_writer_waits_for_the_window() -> None:
    pair = Pair()
    pair.request(end=True)
    stream = pair.streams[0]
    stream.send_headers(((b":status", b"200"),))
    for _ in range(10):
        stream.send_data(b"x" * 100_000)
    writing = asyncio.create_task(stream.writable())
    taken = _size(pair.carry())
    await asyncio.sleep(0)
    assert stream.full
    assert not writing.done()
    while taken:  # the client reads window by window
        pair.client.acknowledge_received_data(taken, 1)
        taken = _size(pair.carry())
    await asyncio.wait_for(writing, LIMIT)
    assert not stream.full


def _size(seen: list[events.Event]) -> int:
    return sum(len(event.data) for event in seen if isinstance(event, events.DataReceived))


async def test_what_is_sent_after_a_pause_leaves_at_once() -> None:
    pair = Pair()
    pair.request(end=True)
    stream = pair.streams[0]
    await asyncio.sleep(0.01)
    stream.send_headers(((b":status", b"200"),))
    stream.send_data(b"with the trailers", more=True)
    assert not pair.wire.out, "the head, or data that more follows, left alone"
    stream.send_trailers(((b"a", b"b"),))
    assert b"with the trailers" in pair.wire.out, "a turn of the event loop was waited for"
    assert pair.server.streams, "the stream was ended within its own call"
    await asyncio.sleep(0)
    assert stream.ends == [0]


async def test_writer_is_woken_by_the_end_of_its_stream() -> None:
    pair = Pair()
    number = pair.request(end=True)
    stream = pair.streams[0]
    stream.send_headers(((b":status", b"200"),))
    stream.send_data(b"x" * (1 << 20))
    writing = asyncio.create_task(stream.writable())
    await asyncio.sleep(0)
    pair.client.reset_stream(number)
    pair.carry()
    with pytest.raises(StreamEnded):
        await asyncio.wait_for(writing, LIMIT)
    assert stream.ends == [8]
    stream.send_data(b"too late")
    stream.send_trailers(((b"a", b"b"),))
    stream.reset(8)
    pair.carry()


@pytest.mark.promise("G44")
async def test_lost_connection_ends_all_streams() -> None:
    pair = Pair()
    pair.request()
    pair.request()
    pair.server.connection_lost(None)
    assert [stream.ends for stream in pair.streams] == [[None], [None]]
    assert pair.server.ended.done()


async def test_cancelled_wait_for_the_end_does_not_disturb_it() -> None:
    pair = Pair()

    async def wait() -> None:
        await pair.server.ended

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    pair.server.connection_lost(None)


async def test_refused_request_has_no_stream() -> None:
    pair = Pair()
    pair.server._accept = lambda connection, number, _: connection.refuse(number, ((b":status", b"415"),), b"no")
    pair.client.send_request(HEAD, end_stream=True)
    seen = pair.carry()
    assert [event.data for event in seen if isinstance(event, events.DataReceived)] == [b"no"]
    assert not pair.server.streams


FRAME: Callable[[int, int, int, bytes], bytes] = lambda kind, flags, number, payload: (  # noqa: E731
    len(payload).to_bytes(3, "big") + bytes((kind, flags)) + number.to_bytes(4, "big") + payload
)
"""HTTP/2 frame: kind, flags, stream, payload."""


@pytest.mark.parametrize("step", [1, 4, 13, 10_000])
@pytest.mark.parametrize(
    "frames",
    [
        FRAME(2, 0, 0, b"\0\0\0\0\1"),
        FRAME(2, 0, 3, b"\0\0\0\3\1"),
        FRAME(0, 0, 1, b"x"),
        FRAME(3, 0, 1, b"\0\0\0\x08") + FRAME(0, 0, 1, b"x"),
    ],
    ids=["priority-of-no-stream", "priority-on-itself", "data-after-the-end", "data-after-a-reset"],
)
async def test_frame_of_a_closed_stream_ends_the_connection(frames: bytes, step: int) -> None:
    pair = Pair()
    pair.request(end=True)
    for at in range(0, len(frames), step):
        pair.server.data_received(frames[at : at + step])
    assert pair.wire.closing
    assert any(isinstance(event, events.GoAwayReceived) for event in pair.carry())


@pytest.mark.parametrize("step", [1, 4, 13, 10_000])
async def test_overflow_of_a_window_resets_its_stream_only(step: int) -> None:
    pair = Pair()
    number = pair.request()
    frames = FRAME(8, 0, number, (2**31 - 1).to_bytes(4, "big"))
    for at in range(0, len(frames), step):
        pair.server.data_received(frames[at : at + step])
    assert [event.error_code for event in pair.carry() if isinstance(event, events.StreamReset)] == [3]
    assert not pair.wire.closing


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\x40" + bytes((len(name),)) + name + bytes((len(value),)) + value


FIELDS = (
    b"\x83\x86",  # POST, http: of the static table
    b"\x3f\xe1\x1f",  # the size of the dynamic table
    _literal(b":path", b"/x@y"),
    _literal(b":authority", b"tmp%2Fa@b@%2Fs"),
    b"\x41\x03u@h",  # the same name from the static table
    _literal(b"x", b"mail@example.org"),
)


@pytest.mark.parametrize("step", [1, 9, 14, 10_000])
@pytest.mark.parametrize("index", [3, 4], ids=["grpcio", "indexed"])
@pytest.mark.parametrize(
    ("flags", "before", "after"), [(4, b"", b""), (12, b"\2", b"@@"), (36, b"\0\0\0\0\x10", b"")]
)
async def test_authority_with_at_is_accepted(index: int, flags: int, before: bytes, after: bytes, step: int) -> None:
    pair = Pair()
    heads: list[Headers] = []

    def accept(connection: Connection, number: int, headers: Headers) -> Echo:
        heads.append(headers)
        return Echo(connection, number)

    pair.server._accept = accept
    block = FIELDS[1] + FIELDS[0] + FIELDS[2] + FIELDS[index] + FIELDS[5]
    frames = FRAME(1, flags, 1, before + block + after) + FRAME(0, 1, 1, b"a@b")
    for at in range(0, len(frames), step):
        pair.server.data_received(frames[at : at + step])
    [head] = heads
    assert dict(head)[b":path"] == b"/x@y"
    assert b"@" not in dict(head)[b":authority"]
    assert dict(head)[b"x"] == b"mail@example.org"


@given(st.binary(max_size=60))
def test_any_header_block_keeps_its_length(block: bytes) -> None:
    frame = FRAME(1, 4, 1, block + b"@")
    assert len(without_at(frame)) == len(frame)


@pytest.mark.promise("G43")
async def test_long_stream_outlives_thousands_that_the_server_ended() -> None:
    """Frames of streams that the server has reset may be under way; it does not remember all of them."""
    pair = Pair()
    first = pair.request(b"a")
    for _ in range(31_000):
        number = pair.client.send_request(HEAD)
        pair.server.data_received(pair.client.data_to_send())
        pair.streams.pop().reset(8)
        pair.server.flush()
        pair.wire.take()
        pair.client.reset_stream(number)  # not carried
        pair.client.data_to_send()
    pair.client.send_data(first, b"b")
    pair.carry()
    assert pair.streams[0].body == b"ab"
    assert not pair.wire.closing


def _bomb() -> bytes:
    """A header of 4,000 bytes, and references to it."""
    name = _literal(b"x", b"")[:-1] + b"\x7f\xa1\x1e" + b"v" * 4000
    return FRAME(1, 0, 1, FIELDS[0] + FIELDS[2] + name) + FRAME(9, 4, 1, b"\xbe" * 10_000)


@pytest.mark.promise("G46")
@pytest.mark.parametrize(
    "flood",
    [
        FRAME(6, 0, 0, b"12345678") * 2000,
        FRAME(4, 0, 0, b"") * 2000,
        FRAME(1, 0, 1, FIELDS[0] + FIELDS[2]) + FRAME(9, 0, 1, b"\0\1x\1y" * 3000) * 100,
        FRAME(1, 0, 1, FIELDS[0] + FIELDS[2]) + FRAME(9, 0, 1, b"") * 1000,
        _bomb(),
    ],
    ids=["pings", "settings", "continuations", "empty-continuations", "references"],
)
async def test_flood_ends_its_connection(flood: bytes) -> None:
    """The client reads nothing."""
    pair = Pair()
    pair.server.pause_writing()
    for at in range(0, len(flood), 60_000):
        pair.server.data_received(flood[at : at + 60_000])
    assert pair.wire.closing
    assert not pair.streams


async def test_answers_to_pings_wait_for_their_reader() -> None:
    pair = Pair()
    for _ in range(20):  # read in between, any number is answered
        pair.server.data_received(FRAME(6, 0, 0, b"12345678") * 900)
    assert pair.wire.out.count(b"12345678") == 18_000
    assert not pair.wire.closing


@pytest.mark.promise("G43")
async def test_server_stops_before_a_connection_has_its_transport() -> None:
    server, wire = NativeServer(), Wire()
    connection = server.connection()
    stopping = asyncio.create_task(server.stop(0))
    await asyncio.sleep(0)
    assert not stopping.done()
    connection.connection_made(wire)
    assert wire.closing
    connection.connection_lost(None)
    await asyncio.wait_for(stopping, LIMIT)
    late, wire = server.connection(), Wire()
    late.connection_made(wire)
    assert wire.closing
