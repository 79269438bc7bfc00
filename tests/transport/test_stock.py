"""Connections that are opened before they are needed, to real servers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import BadGatewayError, UnavailableError
from engine_plugin.system.certificates import Identity, load_identity
from engine_plugin.transport import connections
from engine_plugin.transport.http1 import Http1Client
from tests.patience import NEVER, pace, until, within
from tests.process.conftest import descriptors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
AHEAD = 4
KINDS = ["tcp", "tls"] if sys.platform == "win32" else ["tcp", "tls", "unix"]


class Server:
    """Answers requests and keeps connections open; closes one without an answer after `answers` POSTs.

    `requests` has the methods that came over each connection.
    """

    def __init__(self, answers: int = 1_000_000) -> None:
        self.answers = answers
        self.address: Any = None
        self.requests: list[list[bytes]] = []
        self.unused: dict[int, asyncio.StreamWriter] = {}
        self.open = 0

    @property
    def posts(self) -> int:
        return sum(methods.count(b"POST") for methods in self.requests)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.requests)
        methods: list[bytes] = []
        self.requests.append(methods)
        self.unused[number] = writer
        self.open += 1
        try:
            while self.posts <= self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                self.unused.pop(number, None)
                methods.append(head.split()[0])
                if methods[-1] == b"POST":
                    await reader.readexactly(2)
                if self.posts <= self.answers:
                    writer.write(ANSWER)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has closed it
        finally:
            self.unused.pop(number, None)
            self.open -= 1
            writer.close()

    def close_unused(self) -> None:
        """Close the connections that have carried no request."""
        for writer in self.unused.values():
            writer.close()


@asynccontextmanager
async def listening(
    server: Server, kind: str = "tcp", folder: Path | None = None, port: int = 0, **options: Any
) -> AsyncIterator[Http1Client]:
    """A client of the server, and the server, until the block is left."""
    tls: dict[str, Any] = {}
    if kind == "tls":
        assert folder is not None
        identity = Identity.create()
        tls["ssl"] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        load_identity(tls["ssl"], identity, folder)
        options["tls"] = ssl.create_default_context(cadata=identity.certificate_pem.decode())
    if kind == "unix":
        server.address = f"{folder}/s"
        listener = await asyncio.start_unix_server(server.connected, server.address)
    else:
        listener = await asyncio.start_server(server.connected, "127.0.0.1", port, **tls)
        server.address = ("localhost" if tls else "127.0.0.1", listener.sockets[0].getsockname()[1])
    client = Http1Client(server.address, resend=False, ahead=AHEAD, **options)
    try:
        yield client
    finally:
        client.close()
        listener.close()
        await until(lambda: not server.open, "all connections are closed")


async def post(client: Http1Client, method: str = "POST") -> bytes:
    async with client.request(method, "/x", b"{}" if method == "POST" else None) as response:
        return await response.read(1 << 20)


async def stocked(client: Http1Client, server: Server) -> None:
    """Send requests until a connection waits that has carried none."""
    assert await within(post(client)) == b"hello"
    assert await within(post(client)) == b"hello"
    await until(lambda: len(server.unused) == 1, "a connection is opened ahead")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine, connections do not expire, and requests follow each other closely."""
    monkeypatch.setattr(connections, "_FRESH", NEVER)


@pytest.mark.parametrize("kind", KINDS)
async def test_request_takes_a_connection_that_was_opened_before_it(kind: str, short_dir: Path) -> None:
    server = Server()
    async with listening(server, kind, short_dir) as client:
        await stocked(client, server)
        for _ in range(5):
            opened = len(server.requests)
            [number] = server.unused
            assert await within(post(client)) == b"hello"
            assert server.requests[number] == [b"POST"]
            await until(lambda: len(server.unused) == 1, "the next one is opened")
            assert len(server.requests) == opened + 1
    assert server.posts == 7
    assert all(len(methods) <= 1 for methods in server.requests)


async def test_nothing_is_opened_before_the_second_request() -> None:
    server = Server()
    async with listening(server) as client:
        for _ in range(10):
            await asyncio.sleep(0)
        assert server.requests == []
        assert await within(post(client)) == b"hello"
        for _ in range(10):
            await asyncio.sleep(0)
        assert server.requests == [[b"POST"]]


async def test_get_uses_neither_the_stock_nor_a_connection_of_a_post() -> None:
    server = Server()
    async with listening(server) as client:
        await stocked(client, server)
        assert await within(post(client, "GET")) == b"hello"
        assert await within(post(client, "GET")) == b"hello"
        assert len(server.unused) == 1
        assert [b"GET", b"GET"] in server.requests


async def test_concurrent_requests_open_a_bounded_number_ahead() -> None:
    server = Server()
    async with listening(server) as client:

        async def caller() -> None:
            for _ in range(10):
                assert await post(client) == b"hello"

        await within(asyncio.gather(*(caller() for _ in range(16))))
        await until(lambda: len(server.unused) <= AHEAD, "requests have arrived")
        for _ in range(20):
            await asyncio.sleep(0)
        assert 1 <= len(server.unused) <= AHEAD
    assert server.posts == 160
    assert all(len(methods) <= 1 for methods in server.requests)


async def test_connection_closed_by_the_server_is_not_used() -> None:
    """Nor are further ones opened ahead to a server that closes them."""
    server = Server()
    async with listening(server) as client:
        await stocked(client, server)
        server.close_unused()
        await until(lambda: not server.unused, "the server has closed it")
        opened = len(server.requests)
        for _ in range(5):
            assert await within(post(client)) == b"hello"
        assert len(server.requests) == opened + 5
    assert server.posts == 7


async def test_connection_whose_end_the_event_loop_has_not_seen_is_not_used() -> None:
    """The system knows of the end before the event loop does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Http1Client(listener.getsockname()[:2], resend=False, ahead=AHEAD)

        async def answered(asking: asyncio.Task[bytes], *accepted: socket.socket) -> None:
            server = asyncio.get_running_loop()
            for one in accepted:
                await within(server.sock_recv(one, 1000))
                await within(server.sock_sendall(one, ANSWER))
            assert await within(asking) == b"hello"

        async def accept() -> socket.socket:
            return (await within(asyncio.get_running_loop().sock_accept(listener)))[0]

        listener.setblocking(False)
        with contextlib.ExitStack() as opened:
            for _ in range(2):
                asking = asyncio.create_task(post(client))
                await answered(asking, opened.enter_context(await accept()))
            unused = await accept()
            await asyncio.sleep(0)
            unused.close()
            asking = asyncio.create_task(post(client))  # its first step runs before the event loop looks at sockets
            await answered(asking, opened.enter_context(await accept()))
        client.close()


async def test_connection_that_has_waited_too_long_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the event loop is to close it."""
    server = Server()
    async with listening(server) as client:
        await stocked(client, server)
        [number] = server.unused
        monkeypatch.setattr(connections, "_FRESH", 0.0)
        assert await within(post(client)) == b"hello"
        assert server.requests[number] == []
        assert server.posts == 3


async def test_server_that_left_and_returns() -> None:
    server = Server()
    async with listening(server) as client:
        await stocked(client, server)
        port = server.address[1]
        server.close_unused()
    with pytest.raises(UnavailableError, match="cannot be reached"):
        await within(post(client))
    successor = Server()
    async with listening(successor, port=port):
        for _ in range(3):
            assert await within(post(client)) == b"hello"
        client.close()
    assert (server.posts, successor.posts) == (2, 3)


async def test_request_over_a_prepared_connection_is_not_sent_twice() -> None:
    """The server reads it and closes the connection without an answer."""
    server = Server(answers=2)
    async with listening(server) as client:
        await stocked(client, server)
        with pytest.raises(BadGatewayError, match="without an answer"):
            await within(post(client))
    assert server.posts == 3


@pytest.mark.promise("P12")
@pytest.mark.parametrize("kind", KINDS)
async def test_unused_connections_expire(kind: str, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    async with listening(server, kind, short_dir) as client:
        before = descriptors()
        await stocked(client, server)
        await within(asyncio.gather(*(post(client) for _ in range(16))))
        client.close()
        await until(lambda: descriptors() <= before, "a closed client keeps none")
        monkeypatch.setattr(connections, "_FRESH", pace(0.5))
        await stocked(client, server)
        await until(lambda: descriptors() <= before, "an idle client keeps none")
        await stocked(client, server)


async def test_closed_client_opens_no_more() -> None:
    server = Server()
    async with listening(server) as client:
        await stocked(client, server)
        opened = len(server.requests)
        asking = asyncio.create_task(post(client))
        await asyncio.sleep(0)  # the request is sent
        client.close()
        assert await within(asking) == b"hello"
        await until(lambda: not server.unused, "all connections without a request are closed")
        assert len(server.requests) == opened


async def test_connection_that_is_being_opened_when_the_client_closes_is_closed() -> None:
    server = Server()
    async with listening(server) as client:
        await stocked(client, server)
        assert await within(post(client)) == b"hello"
        client.close()
        assert await within(post(client)) == b"hello"
        await until(lambda: not server.open, "all connections are closed")
