"""No bytes, raw or of broken frames, make either side of a connection fail or keep anything."""

from __future__ import annotations

import asyncio
import gc
import random
from typing import TYPE_CHECKING, Any

import ngh2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.host.native import NativeChannel
from engine_plugin.host.seam import RpcFailure
from engine_plugin.rpc.http2 import Connection
from engine_plugin.rpc.wire import prefixed
from engine_plugin.server.native import NativeServer
from tests.examples import MORE
from tests.patience import until, within
from tests.rpc.interop import TestService, message, rpc, service
from tests.rpc.test_http2 import FRAME, Wire

if TYPE_CHECKING:
    from collections.abc import Callable

METHODS = (b"EmptyCall", b"UnaryCall", b"StreamingOutputCall", b"StreamingInputCall", b"FullDuplexCall", b"Unknown")
REQUEST = message("SimpleRequest", response_size=5).SerializeToString()
"""A valid request of every method but one."""
RAW = st.lists(
    st.one_of(
        st.binary(max_size=60),
        st.builds(FRAME, st.integers(0, 11), st.integers(0, 63), st.integers(0, 7), st.binary(max_size=20)),
    ),
    max_size=6,
).map(b"".join)


def from_client(source: random.Random) -> bytearray:
    """What a client sends in a few calls."""
    core = ngh2.Connection(ngh2.Role.CLIENT)
    core.initiate_connection({})
    sent = core.data_to_send()
    for _ in range(source.randrange(1, 4)):
        head = [
            (b":method", source.choice((*[b"POST"] * 9, b"GET"))),
            (b":scheme", b"http"),
            (b":path", b"/grpc.testing.TestService/" + source.choice(METHODS)),
            (b":authority", b"a"),
            (b"content-type", source.choice((*[b"application/grpc"] * 9, b"text/plain"))),
            (b"grpc-timeout", source.choice((b"1S", b"1n", b"x", b"99999999H"))),
            (b"grpc-encoding", source.choice((b"gzip", b"identity", b"identity", b"br"))),
        ]
        number = core.send_request(head)
        body = prefixed(REQUEST) * source.randrange(3) + source.choice(
            (b"", b"", b"\1\0\0\0\1x", b"\2", b"\0\xff\xff")
        )
        core.send_data(number, body, end_stream=source.random() < 0.8)
        sent += core.data_to_send()
        if source.random() < 0.2:
            core.reset_stream(number, source.randrange(14))
        if source.random() < 0.2:
            core.ping(b"12345678")
    if source.random() < 0.2:
        core.send_goaway()
    return bytearray(sent + core.data_to_send())


def from_server(source: random.Random, request: bytes) -> bytearray:
    """What a server answers to some calls."""
    core = ngh2.Connection(ngh2.Role.SERVER)
    core.initiate_connection({3: source.choice((1, 100))} if source.random() < 0.5 else {})
    core.receive_data(request)
    sent = core.data_to_send()
    for number in (1, 3, 5):
        try:
            _answer(core, number, source)
        except ngh2.NGH2Error:  # the call is not there, or the server has gone away
            continue
        sent += core.data_to_send()
    return bytearray(sent + core.data_to_send())


def _answer(core: ngh2.Connection, number: int, source: random.Random) -> None:
    kind = source.choice((*[b"application/grpc"] * 9, b"text/html"))
    head = [(b":status", source.choice((*[b"200"] * 9, b"503"))), (b"content-type", kind)]
    head += [(b"grpc-encoding", b"gzip")] * (source.random() < 0.3)
    status = [(b"grpc-status", source.choice((b"0", b"0", b"7", b"x"))), (b"grpc-message", b"%zz%e4")]
    match source.randrange(5):
        case 0:
            core.send_response(number, [*head, *status], end_stream=True)
        case 1:
            core.reset_stream(number, source.randrange(14))
        case 2:
            core.send_goaway(source.randrange(3), last_stream_id=source.choice((0, 1, 3)))
        case _:
            core.send_response(number, head)
            body = prefixed(b"") * source.randrange(3) + source.choice((b"", b"\1\0\0\0\1x", b"\0\0"))
            core.send_data(number, body, end_stream=source.random() < 0.1)
            core.send_trailers(number, status)


def spoil(data: bytearray, source: random.Random) -> None:
    at = source.randrange(len(data)) if data else 0
    match source.randrange(5):
        case 0 if data:
            data[at] = source.randrange(256)
        case 1:
            del data[at : at + source.randrange(1, 20)]
        case 2:
            data[at:at] = source.randbytes(source.randrange(1, 20))
        case 3:
            payload = source.randbytes(source.choice((0, 4, 5, 8)))
            data[at:at] = FRAME(source.randrange(12), source.randrange(64), source.randrange(6), payload)
        case _:
            data[at:at] = data[at : at + 40]


async def feed(connection: Connection, wire: Wire, data: bytes, source: random.Random) -> None:
    at = 0
    while at < len(data) and not wire.closing:
        step = source.choice((1, 5, 9, 13, 50, 400, 10_000))
        connection.data_received(data[at : at + step])
        at += step
        if source.random() < 0.1:
            await asyncio.sleep(0)
    for _ in range(4):
        await asyncio.sleep(0)


class Bench:
    """Connections of both roles without sockets. Keeps the errors that reach the event loop."""

    def __init__(self) -> None:
        self.errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.errors.append(context))
        self.servicer, self.server = TestService(), NativeServer()
        self.server.add(service(self.servicer))
        self.server.open()

    async def to_server(self, data: bytes, source: random.Random) -> None:
        wire, connection = Wire(), self.server.connection()
        connection.connection_made(wire)
        await feed(connection, wire, data, source)
        connection.connection_lost(None)

    async def to_client(self, make: Callable[[bytes], bytes], source: random.Random) -> None:
        """Begin three calls; `make` has what the server sends, for what the client sent."""
        wire, channel = Wire(), NativeChannel("unix:/dev/null/none")
        connection = channel._connection = Connection(ngh2.Role.CLIENT)
        connection.connection_made(wire)
        calls = [
            channel.begin(rpc("EmptyCall"), message("Empty"), timeout=None),
            channel.begin(rpc("StreamingOutputCall"), message("StreamingOutputCallRequest"), timeout=60),
            channel.begin(rpc("FullDuplexCall"), timeout=None),
        ]
        reading = [asyncio.create_task(_read(call)) for call in calls]
        await asyncio.sleep(0)
        connection.flush()
        await feed(connection, wire, make(wire.take()), source)
        connection.connection_lost(None)
        await within(asyncio.gather(*reading))
        await channel.close()
        assert not connection.streams

    async def check(self) -> None:
        """Nothing failed, and nothing is left."""
        await until(lambda: not self.server._tasks, "the tasks of all calls end")
        assert not self.server._connections
        assert self.server.large == 0
        assert self.servicer.running == 0
        assert not self.errors
        gc.collect()
        assert not [each for each in gc.get_objects() if isinstance(each, Connection)]


async def _read(call: Any) -> None:
    try:
        while await call.read() is not None:
            pass
    except RpcFailure:
        return


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + FRAME(4, 0, 0, b"")
EACH = 1000 if MORE else 20
"""Connections for each example of broken frames: a thousand with ABUSE."""


@pytest.mark.promise("G45")
@given(st.booleans(), RAW, st.integers(0, 2**64))
async def test_server_survives_any_bytes(greet: bool, data: bytes, seed: int) -> None:
    bench = Bench()
    await bench.to_server((PREFACE if greet else b"") + data, random.Random(seed))  # noqa: S311  # no secrets
    await bench.check()


@pytest.mark.promise("G45")
@given(st.booleans(), RAW, st.integers(0, 2**64))
async def test_client_survives_any_bytes(greet: bool, data: bytes, seed: int) -> None:
    bench = Bench()
    sent = (FRAME(4, 0, 0, b"") if greet else b"") + data
    await bench.to_client(lambda _request: sent, random.Random(seed))  # noqa: S311  # no secrets
    await bench.check()


@pytest.mark.promise("G45")
@given(st.integers(0, 2**64))
async def test_server_survives_broken_frames(seed: int) -> None:
    bench, source = Bench(), random.Random(seed)  # noqa: S311  # no secrets
    for _ in range(EACH):
        data = from_client(source)
        for _ in range(source.randrange(4)):
            spoil(data, source)
        await bench.to_server(bytes(data), source)
    await bench.check()


@pytest.mark.promise("G45")
@given(st.integers(0, 2**64))
async def test_client_survives_broken_frames(seed: int) -> None:
    bench, source = Bench(), random.Random(seed)  # noqa: S311  # no secrets

    def make(request: bytes) -> bytes:
        data = from_server(source, request)
        for _ in range(source.randrange(4)):
            spoil(data, source)
        return bytes(data)

    for _ in range(EACH):
        await bench.to_client(make, source)
    await bench.check()
