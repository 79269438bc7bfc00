"""The HTTP client on the token's way, against a server that sends exactly what a test says."""

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
    """One request as the server got it, and the way to answer it."""

    def __init__(self, head: bytes, body: bytes, connection: int, writer: asyncio.StreamWriter) -> None:
        self.head = head
        self.body = body
        self.connection = connection
        self.writer = writer

    async def send(self, *pieces: bytes) -> None:
        """Send pieces, each in a segment of its own as far as that can be had."""
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
        """Ends when the client closes; asyncio's reader has no other way to ask without reading."""
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


async def test_what_is_sent(kind: str, short_dir: Path) -> None:
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


async def test_a_big_request(kind: str, short_dir: Path) -> None:
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
async def test_an_answer_cut_at_every_byte(kind: str, short_dir: Path, name: str) -> None:
    """One connection for all: a body's end is known to the byte."""
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
async def test_an_answer_byte_by_byte(kind: str, short_dir: Path, name: str) -> None:
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
def test_any_chunks_cut_anywhere(chunks: list[bytes], cuts: list[int], kind: str) -> None:
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


async def test_a_body_until_the_end_of_the_connection(kind: str, short_dir: Path) -> None:
    async with serving(kind, short_dir, says(b"HTTP/1.0 200 OK\r\n\r\nabc", b"def")) as (server, client):
        assert await fetch(client) == (200, b"abcdef")
        assert await fetch(client) == (200, b"abcdef")
        assert server.connections == 2


@pytest.mark.parametrize("status", [204, 304])
async def test_answers_without_body(kind: str, short_dir: Path, status: int) -> None:
    async with serving(kind, short_dir, says(b"HTTP/1.1 %d X\r\n\r\n" % status, keep=True)) as (server, client):
        assert await fetch(client) == (status, b"")
        assert await fetch(client) == (status, b"")
        assert server.connections == 1


async def test_status_and_headers(kind: str, short_dir: Path) -> None:
    wire = b"HTTP/1.1 503 Service Unavailable\r\nX-One:  two \r\ncontent-length: 2\r\n\r\nno"
    async with serving(kind, short_dir, says(wire)) as (_, client), client.request("GET", "/") as response:
        assert (response.status, response.headers["x-one"]) == (503, "two")
        assert await within(response.read(2)) == b"no"
        assert await within(response.read_some()) == b""


async def test_what_has_arrived_is_handed_over_as_one(kind: str, short_dir: Path) -> None:
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


async def test_read_with_a_limit(kind: str, short_dir: Path) -> None:
    wire = CHUNKED + b"5\r\nhello\r\n0\r\n\r\n"
    async with serving(kind, short_dir, says(wire)) as (_, client):
        assert await fetch(client, 5) == (200, b"hello")
        with pytest.raises(BadGatewayError, match="longer than 4 bytes"):
            await fetch(client, 4)


async def test_reading_after_the_block(kind: str, short_dir: Path) -> None:
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
    "size that is none": CHUNKED + b"xyz\r\nhello\r\n0\r\n\r\n",
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
async def test_broken_answers(kind: str, short_dir: Path, name: str) -> None:
    """Each one is an error that says what is wrong, and the connection is not used again."""
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
async def test_what_is_no_http_is_refused_at_its_first_bytes(kind: str, short_dir: Path, wire: bytes) -> None:
    """Whoever says it may say no more, and leave the connection open."""

    async def answer(call: Call) -> None:
        await call.send(wire)
        await asyncio.Event().wait()

    async with serving(kind, short_dir, answer) as (_, client):
        with pytest.raises(BadGatewayError, match="does not answer in HTTP"):
            await fetch(client)


@pytest.mark.promise("P26")
@given(wire=st.binary(max_size=60), head=st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", CHUNKED]))
def test_any_garbage_is_an_error_of_ours(wire: bytes, head: bytes) -> None:
    async def play() -> None:
        async with serving("tcp", Path(), says(head + wire)) as (_, client):
            with contextlib.suppress(BadGatewayError):
                await fetch(client)

    asyncio.run(play())


async def test_what_came_before_the_break_is_handed_over(kind: str, short_dir: Path) -> None:
    go = asyncio.Event()

    async def answer(call: Call) -> None:
        await call.send(CHUNKED + b"5\r\nhello\r\n")
        await go.wait()

    async with serving(kind, short_dir, answer) as (_, client), client.request("GET", "/") as response:
        assert await within(response.read_some()) == b"hello"
        go.set()
        with pytest.raises(BadGatewayError, match="broke off"):
            await within(response.read_some())


async def test_a_reset_is_no_end_of_a_body(short_dir: Path) -> None:
    """A body that goes to the end of the connection is whole only if the connection was closed in order."""
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


async def test_a_connection_serves_one_request_at_a_time(kind: str, short_dir: Path) -> None:
    async with serving(kind, short_dir, says(PLAIN, keep=True)) as (server, client):
        async with client.request("GET", "/") as one, client.request("GET", "/") as two:
            assert await within(one.read(9)) == await within(two.read(9)) == b"hello"
        assert server.connections == 2
        await fetch(client)
        assert server.connections == 2


async def test_a_connection_that_the_server_wants_closed(kind: str, short_dir: Path) -> None:
    wire = b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 1\r\n\r\nx"
    async with serving(kind, short_dir, says(wire, keep=True)) as (server, client):
        await fetch(client)
        await within(server.gone.wait())
        await fetch(client)
        assert server.connections == 2


async def test_bytes_that_nobody_asked_for(kind: str, short_dir: Path) -> None:
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


async def test_old_idle_connections_are_dropped_when_another_comes_back(
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


async def test_a_server_that_closes_an_idle_connection(kind: str, short_dir: Path) -> None:
    """Noticed or not, the caller does not see it."""
    async with serving(kind, short_dir, says(PLAIN)) as (server, client):
        for _ in range(3):
            assert await fetch(client) == (200, b"hello")
        assert [call.connection for call in server.calls] == [0, 1, 2]


async def test_a_server_that_closes_upon_the_next_request(kind: str, short_dir: Path) -> None:
    """The worst moment: our request is on its way already. It is sent once more, and only once."""
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


async def test_nobody_listens(kind: str, short_dir: Path) -> None:
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
async def test_leaving_early_tells_the_server_at_once(kind: str, short_dir: Path) -> None:
    """(23) Closing the connection is how the engine learns that nobody wants its answer."""

    async def answer(call: Call) -> None:
        await call.send(CHUNKED + b"1\r\na\r\n")
        await asyncio.Event().wait()

    async with serving(kind, short_dir, answer) as (server, client):
        async with client.request("GET", "/") as response:
            assert await within(response.read_some()) == b"a"
        await within(server.gone.wait())


@pytest.mark.promise("F23", "F24")
@pytest.mark.parametrize("moment", ["before the head", "inside the body", "reading the body"])
async def test_a_cancelled_caller_closes_the_connection(kind: str, short_dir: Path, moment: str) -> None:
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
async def test_given_up_by_somebody_else(kind: str, short_dir: Path, moment: str) -> None:
    """Whoever waits gets an error, the server sees a closed connection, and nothing is asked again."""
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
async def test_cancelled_while_connecting(short_dir: Path) -> None:
    """A full backlog lets a connection hang."""
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


async def test_a_server_that_accepts_nothing(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_plugin.transport.http1._CONNECT_TIMEOUT", 0.2)
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


async def test_closing_the_client_drops_what_is_idle(kind: str, short_dir: Path) -> None:
    async with serving(kind, short_dir, says(PLAIN, keep=True)) as (server, client):
        await fetch(client)
        client.close()
        await within(server.gone.wait())
        assert await fetch(client) == (200, b"hello")


# Back-pressure


@pytest.mark.promise("P9")
async def test_a_reader_that_pauses_holds_the_server_back(kind: str, short_dir: Path) -> None:
    """What is accepted is bounded by our buffer and the kernel's, whatever the server wants to send."""
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
async def test_many_exchanges_leave_no_descriptor(kind: str, short_dir: Path) -> None:
    async with serving(kind, short_dir, says(PLAIN, keep=True)) as (_, client):
        await fetch(client)
        before = descriptors()
        for _ in range(30):
            async with client.request("GET", "/"):
                pass
            await fetch(client)
        await until(lambda: descriptors() <= before + 2, "descriptors leak")
