"""The HTTP client for answers of engines, against a server that sends exactly the bytes of a test."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import BadGatewayError, UnavailableError
from engine_plugin.transport import http1
from engine_plugin.transport.http1 import Http1Client
from tests.examples import FEW
from tests.patience import LIMIT, until, within
from tests.process.conftest import descriptors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

KINDS = ["tcp"] if sys.platform == "win32" else ["unix", "tcp"]


class Call:
    """One request as the server received it, with a method to answer it."""

    def __init__(self, head: bytes, body: bytes, connection: int, writer: asyncio.StreamWriter) -> None:
        self.head = head
        self.body = body
        self.connection = connection
        self.writer = writer

    async def send(self, *pieces: bytes) -> None:
        """Send pieces, each in its own segment where possible."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0)


Answer = Callable[[Call], Awaitable[bool | None]]
"""Answers a call; True: keep the connection."""


class Server:
    """Listens at `address`; each connection's calls are handed to `answer`."""

    def __init__(self) -> None:
        self.address: str | tuple[str, int] = ""
        self.calls: list[Call] = []
        self.connections = 0
        self.gone = asyncio.Event()
        """Set when a client has closed a connection."""
        self.answer: Answer
        self._tasks: set[asyncio.Task[None]] = set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = self.connections
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._serve(reader, writer, number):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            self.gone.set()
        except asyncio.CancelledError:
            pass  # the end of the test
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        call = Call(head, await reader.readexactly(length), number, writer)
        self.calls.append(call)
        watching = asyncio.create_task(self._watch(reader))
        answering = asyncio.ensure_future(self.answer(call))
        try:
            await asyncio.wait({watching, answering}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ConnectionResetError
            return bool(answering.result())
        finally:
            for task in (watching, answering):
                task.cancel()
            await asyncio.gather(watching, answering, return_exceptions=True)

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        """End when the client closes; asyncio's reader cannot report it without a read."""
        while not reader.at_eof() and reader.exception() is None:  # noqa: ASYNC110
            await asyncio.sleep(0.002)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def serving(kind: str, folder: Path, answer: Answer) -> AsyncIterator[tuple[Server, Http1Client]]:
    server = Server()
    server.answer = answer
    if kind == "unix":
        server.address = str(folder / "s.sock")
        listener = await asyncio.start_unix_server(server.connected, server.address)
    else:
        listener = await asyncio.start_server(server.connected, "127.0.0.1", 0)
        server.address = listener.sockets[0].getsockname()[:2]
    client = Http1Client(server.address, {"authorization": "Bearer key"})
    try:
        yield server, client
    finally:
        client.close()
        listener.close()
        await server.close()
        await listener.wait_closed()
        if kind == "unix":
            (folder / "s.sock").unlink(missing_ok=True)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def says(*pieces: bytes, keep: bool = False) -> Answer:
    async def answer(call: Call) -> bool:
        await call.send(*pieces)
        return keep

    return answer


async def fetch(client: Http1Client, limit: int = 1 << 24) -> tuple[int, bytes]:
    async with asyncio.timeout(LIMIT), client.request("GET", "/x") as response:
        return response.status, await response.read(limit)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

# Requests


async def test_request_is_sent_with_head_and_body(kind: str, short_dir: Path) -> None:
    async with serving(kind, short_dir, says(PLAIN, keep=True)) as (server, client):
        assert await fetch(client) == (200, b"hello")
        async with within_request(client, b'{"a": 1}') as body:
            assert body == b"hello"
    host = "localhost" if kind == "unix" else f"127.0.0.1:{server.address[1]}"
    get, post = server.calls
    assert get.head == f"GET /x HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer key\r\n\r\n".encode()
    assert post.head.startswith(b"POST /y HTTP/1.1\r\n")
    assert b"\r\ncontent-type: application/json\r\ncontent-length: 8\r\n" in post.head
    assert post.body == b'{"a": 1}'
    assert get.connection == post.connection


@asynccontextmanager
async def within_request(client: Http1Client, body: bytes) -> AsyncIterator[bytes]:
    async with asyncio.timeout(LIMIT), client.request("POST", "/y", body) as response:
        yield await response.read(1000)


async def test_large_request_is_sent(kind: str, short_dir: Path) -> None:
    big = bytes(range(256)) * 20_000
    async with serving(kind, short_dir, says(PLAIN)) as (server, client):
        async with within_request(client, big) as body:
            assert body == b"hello"
        assert server.calls[0].body == big


# Answers

ANSWERS = {
    "chunked": (CHUNKED + b"5\r\nhello\r\n6;name=value\r\n world\r\n0\r\n\r\n", b"hello world"),
    "chunked, upper case hex": (CHUNKED + b"00A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    "chunked, empty": (CHUNKED + b"0\r\n\r\n", b""),
    "chunked, with trailers": (CHUNKED + b"1\r\na\r\n0\r\nx-sum: 5\r\ny: 6\r\n\r\n", b"a"),
    "chunk that looks like one": (CHUNKED + b"7\r\n0\r\n\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n\r\n"),
    "content-length": (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", b"hello"),
    "content-length 0": (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b""),
    "interim, then chunked": (
        b"HTTP/1.1 100 Continue\r\ncontent-length: 0\r\n\r\n" + CHUNKED + b"1\r\na\r\n0\r\n\r\n",
        b"a",
    ),
    "interim answers": (
        b"HTTP/1.1 100 Continue\r\ncontent-length: 0\r\n\r\nHTTP/1.1 103 X\r\n\r\n" + PLAIN,
        b"hello",
    ),
}


@pytest.mark.promise("P25")
@pytest.mark.parametrize("name", ANSWERS)
async def test_answer_cut_at_any_byte_is_whole(kind: str, short_dir: Path, name: str) -> None:
    """All answers share one connection, so the end of each body must be found exactly."""
    wire, body = ANSWERS[name]
    cuts = iter(range(len(wire) + 1))

    async def answer(call: Call) -> bool:
        cut = next(cuts)
        await call.send(wire[:cut], wire[cut:])
        return True

    async with serving(kind, short_dir, answer) as (server, client):
        for _ in range(len(wire) + 1):
            assert await fetch(client) == (200, body)
        assert server.connections == 1


@pytest.mark.parametrize("name", ANSWERS)
async def test_answer_that_arrives_byte_by_byte_is_whole(kind: str, short_dir: Path, name: str) -> None:
    wire, body = ANSWERS[name]
    pieces = [wire[at : at + 1] for at in range(len(wire))]
    async with serving(kind, short_dir, says(*pieces)) as (_, client):
        assert await fetch(client) == (200, body)


@pytest.mark.promise("P25")
@FEW
@given(
    chunks=st.lists(st.binary(min_size=1, max_size=40), max_size=8),
    cuts=st.lists(st.integers(0, 1000), max_size=8),
    kind=st.sampled_from(KINDS),
)
def test_chunked_answer_cut_anywhere_is_whole(chunks: list[bytes], cuts: list[int], kind: str) -> None:
    wire = CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    places = sorted({0, len(wire), *(cut % len(wire) for cut in cuts)})
    pieces = [wire[start:end] for start, end in pairwise(places)]

    async def play(folder: Path) -> None:
        async with serving(kind, folder, says(*pieces)) as (_, client):
            assert await fetch(client) == (200, b"".join(chunks))

    folder = Path(tempfile.mkdtemp(prefix="eph-"))
    try:
        asyncio.run(play(folder))
    finally:
        shutil.rmtree(folder)


async def test_body_without_length_ends_with_the_connection(kind: str, short_dir: Path) -> None:
    async with serving(kind, short_dir, says(b"HTTP/1.0 200 OK\r\n\r\nabc", b"def")) as (server, client):
        assert await fetch(client) == (200, b"abcdef")
        assert await fetch(client) == (200, b"abcdef")
        assert server.connections == 2


@pytest.mark.parametrize("status", [204, 304])
async def test_answer_without_a_body_is_empty(kind: str, short_dir: Path, status: int) -> None:
    async with serving(kind, short_dir, says(b"HTTP/1.1 %d X\r\n\r\n" % status, keep=True)) as (server, client):
        assert await fetch(client) == (status, b"")
        assert await fetch(client) == (status, b"")
        assert server.connections == 1


async def test_status_and_headers_are_read(kind: str, short_dir: Path) -> None:
    wire = b"HTTP/1.1 503 Service Unavailable\r\nX-One:  two \r\ncontent-length: 2\r\n\r\nno"
    async with serving(kind, short_dir, says(wire)) as (_, client), client.request("GET", "/") as response:
        assert (response.status, response.headers["x-one"]) == (503, "two")
        assert await within(response.read(2)) == b"no"
        assert await within(response.read_some()) == b""


async def test_received_bytes_are_returned_as_one_block(kind: str, short_dir: Path) -> None:
    go = asyncio.Event()

    async def answer(call: Call) -> None:
        await call.send(CHUNKED + b"1\r\na\r\n")
        await go.wait()
        await call.send(b"1\r\nb\r\n" * 3 + b"0\r\n\r\n")

    async with serving(kind, short_dir, answer) as (_, client), client.request("GET", "/") as response:
        assert await within(response.read_some()) == b"a"
        go.set()
        assert await within(response.read_some()) == b"bbb"
        assert await within(response.read_some()) == b""


async def test_body_above_the_limit_is_an_error(kind: str, short_dir: Path) -> None:
    wire = CHUNKED + b"5\r\nhello\r\n0\r\n\r\n"
    async with serving(kind, short_dir, says(wire)) as (_, client):
        assert await fetch(client, 5) == (200, b"hello")
        with pytest.raises(BadGatewayError, match="longer than 4 bytes"):
            await fetch(client, 4)


async def test_read_after_the_block_raises(kind: str, short_dir: Path) -> None:
    async with serving(kind, short_dir, says(PLAIN)) as (_, client):
        async with client.request("GET", "/") as response:
            pass
        with pytest.raises(BadGatewayError, match="already closed"):
            await within(response.read_some())


# Answers that are none

BROKEN = {
    "garbage": b"\x00\x01\x02 garbage\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "superscript status": "HTTP/1.1 ²00 OK\r\n\r\n".encode("latin-1"),
    "HTTP/2": b"HTTP/2 200 OK\r\n\r\n",
    "negative length": b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\nhello",
    "length in words": b"HTTP/1.1 200 OK\r\ncontent-length: five\r\n\r\nhello",
    "superscript length": "HTTP/1.1 200 OK\r\ncontent-length: ³\r\n\r\nabc".encode("latin-1"),
    "absurd length": b"HTTP/1.1 200 OK\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\nhello",
    "end inside the head": b"HTTP/1.1 200 OK\r\ncontent-le",
    "end before the head": b"",
    "end after an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n",
    "huge head": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000,
    "huge head that ends": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
    "truncated body": b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello",
    "truncated chunk": CHUNKED + b"a\r\nhello",
    "truncated after a chunk": CHUNKED + b"5\r\nhello\r\n",
    "truncated in the size": CHUNKED + b"5\r\nhello\r\n5",
    "truncated in the last chunk": CHUNKED + b"5\r\nhello\r\n0\r\n",
    "truncated trailer": CHUNKED + b"0\r\nx: y\r\n",
    "invalid size": CHUNKED + b"xyz\r\nhello\r\n0\r\n\r\n",
    "negative size": CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
    "empty size": CHUNKED + b"\r\nhello\r\n0\r\n\r\n",
    "absurd size": CHUNKED + b"fffffffff\r\nhello",
    "size with underscore": CHUNKED + b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "endless size": CHUNKED + b"0" * 3000,
    "chunk without its end": CHUNKED + b"5\r\nhelloXX0\r\n\r\n",
    "endless trailer": CHUNKED + b"0\r\n" + b"x: y\r\n" * 20_000,
}


@pytest.mark.promise("P26")
@pytest.mark.parametrize("name", BROKEN)
async def test_malformed_answer_is_an_error_and_closes_the_connection(kind: str, short_dir: Path, name: str) -> None:
    """The error names the fault, and the connection is not reused."""
    good = False

    async def answer(call: Call) -> bool:
        await call.send(PLAIN if good else BROKEN[name])
        return good

    async with serving(kind, short_dir, answer) as (server, client):
        with pytest.raises(BadGatewayError, match="the engine") as caught:
            await fetch(client)
        assert len(str(caught.value)) < 300
        good = True
        connections = server.connections
        assert await fetch(client) == (200, b"hello")
        assert server.connections == connections + 1


@pytest.mark.promise("P26")
@pytest.mark.parametrize("wire", [b"\x16\x03\x01", b"SSH-2.0-", b"HTTP/2 200 OK\r\n", b"\xff"])
async def test_answer_that_is_not_http_is_rejected_at_its_first_bytes(
    kind: str, short_dir: Path, wire: bytes
) -> None:
    """Such a server may send nothing more and keep the connection open."""

    async def answer(call: Call) -> None:
        await call.send(wire)
        await asyncio.Event().wait()

    async with serving(kind, short_dir, answer) as (_, client):
        with pytest.raises(BadGatewayError, match="does not answer in HTTP"):
            await fetch(client)


@pytest.mark.promise("P26")
@given(wire=st.binary(max_size=60), head=st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", CHUNKED]))
def test_any_garbage_is_a_bad_gateway_error(wire: bytes, head: bytes) -> None:
    async def play() -> None:
        async with serving("tcp", Path(), says(head + wire)) as (_, client):
            with contextlib.suppress(BadGatewayError):
                await fetch(client)

    asyncio.run(play())


async def test_bytes_before_a_broken_connection_are_returned(kind: str, short_dir: Path) -> None:
    go = asyncio.Event()

    async def answer(call: Call) -> None:
        await call.send(CHUNKED + b"5\r\nhello\r\n")
        await go.wait()

    async with serving(kind, short_dir, answer) as (_, client), client.request("GET", "/") as response:
        assert await within(response.read_some()) == b"hello"
        go.set()
        with pytest.raises(BadGatewayError, match="broke off"):
            await within(response.read_some())


async def test_reset_does_not_end_a_body(short_dir: Path) -> None:
    """A body without length is complete only if the connection was closed properly."""
    read = asyncio.Event()

    async def answer(call: Call) -> None:
        await call.send(b"HTTP/1.0 200 OK\r\n\r\nabc")
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00" if sys.platform != "win32" else b"\x01\x00\x00\x00"
        sock = call.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await read.wait()  # the reset would discard the bytes
        call.writer.transport.abort()

    async with serving("tcp", short_dir, answer) as (_, client), client.request("GET", "/") as response:
        assert await within(response.read_some()) == b"abc"
        read.set()
        with pytest.raises(BadGatewayError, match="broke off"):
            await within(response.read_some())


# Connections


async def test_connection_carries_one_request_at_a_time(kind: str, short_dir: Path) -> None:
    async with serving(kind, short_dir, says(PLAIN, keep=True)) as (server, client):
        async with client.request("GET", "/") as one, client.request("GET", "/") as two:
            assert await within(one.read(9)) == await within(two.read(9)) == b"hello"
        assert server.connections == 2
        await fetch(client)
        assert server.connections == 2


async def test_connection_close_header_is_obeyed(kind: str, short_dir: Path) -> None:
    wire = b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 1\r\n\r\nx"
    async with serving(kind, short_dir, says(wire, keep=True)) as (server, client):
        await fetch(client)
        await within(server.gone.wait())
        await fetch(client)
        assert server.connections == 2


async def test_unrequested_bytes_close_the_connection(kind: str, short_dir: Path) -> None:
    async with serving(kind, short_dir, says(PLAIN + b"HTTP/1.1 200 OK\r\n", keep=True)) as (server, client):
        assert await fetch(client) == (200, b"hello")
        assert await fetch(client) == (200, b"hello")
        assert server.connections == 2


async def test_idle_connections_expire(kind: str, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(of llama.cpp) It closes after 5 s; meeting a connection that is just closing costs a retry."""
    now = 1000.0
    monkeypatch.setattr(http1, "time", SimpleNamespace(monotonic=lambda: now))  # not asyncio's clock
    async with serving(kind, short_dir, says(PLAIN, keep=True)) as (server, client):
        await fetch(client)
        now += 3.9
        await fetch(client)
        assert server.connections == 1
        now += 4.1
        await fetch(client)
        assert server.connections == 2
        await within(server.gone.wait())


async def test_expired_idle_connections_are_closed_when_another_is_returned(
    kind: str, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(http1, "time", SimpleNamespace(monotonic=lambda: now))  # not asyncio's clock
    async with serving(kind, short_dir, says(PLAIN, keep=True)) as (server, client):
        async with client.request("GET", "/") as one, client.request("GET", "/") as two:
            await within(one.read(9))
            await within(two.read(9))
        now += 3
        await fetch(client)
        now += 3
        await fetch(client)
        await within(server.gone.wait())
        assert server.connections == 2


async def test_idle_connection_closed_by_the_server_is_replaced(kind: str, short_dir: Path) -> None:
    """The caller does not notice, whether the close was detected before or not."""
    async with serving(kind, short_dir, says(PLAIN)) as (server, client):
        for _ in range(3):
            assert await fetch(client) == (200, b"hello")
        assert [call.connection for call in server.calls] == [0, 1, 2]


async def test_request_on_a_connection_that_closes_is_resent_once(kind: str, short_dir: Path) -> None:
    """The close crosses the request on the wire. The request is sent once more, and only once."""
    silent = 0

    async def answer(call: Call) -> bool:
        nonlocal silent
        if silent:
            silent -= 1
            return False
        await call.send(PLAIN)
        return True

    async with serving(kind, short_dir, answer) as (server, client):
        await fetch(client)
        silent = 1
        assert await fetch(client) == (200, b"hello")
        assert [call.connection for call in server.calls] == [0, 0, 1]
        silent = 2
        with pytest.raises(BadGatewayError, match="without an answer"):
            await fetch(client)
        assert [call.connection for call in server.calls] == [0, 0, 1, 1, 2]


async def test_port_without_a_listener_is_unavailable(kind: str, short_dir: Path) -> None:
    async with serving(kind, short_dir, says(PLAIN)) as (server, client):
        await fetch(client)
    with pytest.raises(UnavailableError, match="cannot be reached"):
        await fetch(client)
    if kind == "unix":
        too_long = Http1Client(str(short_dir / ("x" * 200)))
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await fetch(too_long)
    assert server.connections == 1


# Leaving


@pytest.mark.promise("F23")
async def test_abandoned_answer_closes_the_connection_at_once(kind: str, short_dir: Path) -> None:
    """(23) A closed connection is the sign for the engine to stop its work."""

    async def answer(call: Call) -> None:
        await call.send(CHUNKED + b"1\r\na\r\n")
        await asyncio.Event().wait()

    async with serving(kind, short_dir, answer) as (server, client):
        async with client.request("GET", "/") as response:
            assert await within(response.read_some()) == b"a"
        await within(server.gone.wait())


@pytest.mark.promise("F23", "F24")
@pytest.mark.parametrize("moment", ["before the head", "inside the body", "reading the body"])
async def test_cancelled_caller_closes_the_connection(kind: str, short_dir: Path, moment: str) -> None:
    """(23) Unary calls included."""
    asked = asyncio.Event()

    async def answer(call: Call) -> None:
        if moment != "before the head":
            await call.send(CHUNKED)
        asked.set()
        await asyncio.Event().wait()

    async def ask(client: Http1Client) -> None:
        async with client.request("GET", "/") as response:
            if moment == "reading the body":
                await response.read(1000)
            await asyncio.Event().wait()

    async with serving(kind, short_dir, answer) as (server, client):
        task = asyncio.create_task(ask(client))
        await within(asked.wait())
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await within(server.gone.wait())


@pytest.mark.parametrize("moment", ["before the head", "inside the body", "to its end", "on a kept connection"])
async def test_exchange_aborted_from_another_task_fails_without_a_retry(
    kind: str, short_dir: Path, moment: str
) -> None:
    """The waiting caller gets an error, the server sees a closed connection, and the request is not resent."""
    asked = asyncio.Event()

    async def answer(call: Call) -> bool:
        if moment == "on a kept connection" and len(server.calls) == 1:
            await call.send(PLAIN)
            return True
        if moment == "inside the body":
            await call.send(CHUNKED)
        elif moment == "to its end":
            await call.send(b"HTTP/1.1 200 OK\r\n\r\nhel")
        asked.set()
        await asyncio.Event().wait()
        return False

    async def ask(exchange: http1.Response) -> bytes:
        async with exchange as response:
            return await response.read(1000)

    async with serving(kind, short_dir, answer) as (server, client):
        if moment == "on a kept connection":
            await fetch(client)
        exchange = client.request("GET", "/")
        task = asyncio.create_task(ask(exchange))
        await within(asked.wait())
        calls = len(server.calls)
        exchange.give_up()
        with pytest.raises(BadGatewayError, match="given up"):
            await within(task)
        await within(server.gone.wait())
        assert len(server.calls) == calls


@pytest.mark.promise("F24")
async def test_cancelled_connect_closes_its_socket(short_dir: Path) -> None:
    """A full backlog makes a connection hang."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            client = Http1Client(listener.getsockname()[:2])
            before = descriptors()
            task = asyncio.create_task(fetch(client))
            for _ in range(5):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: descriptors() <= before, "the socket is closed")
        finally:
            for filler in fillers:
                filler.close()


async def test_server_that_does_not_accept_times_out(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_plugin.transport.connections.CONNECT_TIMEOUT", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            with pytest.raises(UnavailableError, match=r"did not accept a connection in 0\.2 s"):
                await fetch(Http1Client(listener.getsockname()[:2]))
        finally:
            for filler in fillers:
                filler.close()


async def test_close_of_the_client_closes_idle_connections(kind: str, short_dir: Path) -> None:
    async with serving(kind, short_dir, says(PLAIN, keep=True)) as (server, client):
        await fetch(client)
        client.close()
        await within(server.gone.wait())
        assert await fetch(client) == (200, b"hello")


# Back-pressure


@pytest.mark.promise("P9")
async def test_paused_reader_holds_the_server_back(kind: str, short_dir: Path) -> None:
    """The received bytes are bounded by the buffers of client and kernel, however much the server sends."""
    size, count = 64 * 1024, 400  # 25 MiB
    sent = 0

    async def answer(call: Call) -> None:
        nonlocal sent
        call.writer.transport.set_write_buffer_limits(0)
        call.writer.write(CHUNKED)
        for _ in range(count):
            call.writer.write(b"%x\r\n%b\r\n" % (size, b"x" * size))
            await call.writer.drain()
            sent += size
        await call.send(b"0\r\n\r\n")

    async with serving(kind, short_dir, answer) as (_, client), client.request("GET", "/") as response:
        await within(response.read_some())
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.1)  # there is no event for "nothing more is sent"
        assert sent < 12 * 1024 * 1024
        total = 0
        async with asyncio.timeout(LIMIT):
            while block := await response.read_some():
                total += len(block)
                assert len(block) < 2 * 1024 * 1024
        assert total > (count - 10) * size
        assert sent == count * size


@pytest.mark.promise("P12")
async def test_many_exchanges_leak_no_descriptor(kind: str, short_dir: Path) -> None:
    async with serving(kind, short_dir, says(PLAIN, keep=True)) as (_, client):
        await fetch(client)
        before = descriptors()
        for _ in range(30):
            async with client.request("GET", "/"):
                pass
            await fetch(client)
        await until(lambda: descriptors() <= before + 2, "descriptors leak")
