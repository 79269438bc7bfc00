"""Connections of the HTTP client: TLS, refused connections, and requests that must not be resent."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import BadGatewayError, UnavailableError
from engine_plugin.system.certificates import Identity, load_identity
from engine_plugin.transport.http1 import Http1Client
from tests.patience import until, within
from tests.process.conftest import descriptors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


class Server:
    """Answers each request with ANSWER; closes a connection without an answer after `answers` of them."""

    def __init__(self, answers: int = 1_000_000) -> None:
        self.answers = answers
        self.heads: list[bytes] = []
        self.connections = 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            for _ in range(self.answers):
                await self._read(reader)
                writer.write(ANSWER)
                await writer.drain()
            await self._read(reader)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        _, found, length = head.lower().partition(b"content-length:")
        await reader.readexactly(int(length.split()[0]) if found else 0)


@asynccontextmanager
async def listening(server: Server, port: int = 0, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    listener = await asyncio.start_server(server.connected, "127.0.0.1", port, ssl=tls)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


async def fetch(client: Http1Client, method: str = "GET") -> bytes:
    async with client.request(method, "/x", b"{}" if method == "POST" else None) as response:
        return await response.read(1 << 20)


@pytest.fixture(scope="module")
def identity() -> Identity:
    return Identity.create()


@pytest.fixture
def tls(identity: Identity, tmp_path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_identity(context, identity, tmp_path)
    return context


async def test_tls_with_a_trusted_authority_works(identity: Identity, tls: ssl.SSLContext) -> None:
    server = Server()
    trusting = ssl.create_default_context(cadata=identity.certificate_pem.decode())
    async with listening(server, tls=tls) as port:
        client = Http1Client(("localhost", port), tls=trusting)
        try:
            answers = [await within(fetch(client)) for _ in range(3)]
        finally:
            client.close()
    assert answers == [b"hello"] * 3
    assert server.connections == 1
    assert f"host: localhost:{port}\r\n".encode() in server.heads[0]


async def test_tls_of_an_unknown_authority_is_rejected(tls: ssl.SSLContext) -> None:
    server = Server()
    async with listening(server, tls=tls) as port:
        client = Http1Client(("localhost", port), tls=ssl.create_default_context(), connect_retries=3)
        with pytest.raises(UnavailableError, match="self-signed certificate") as caught:
            await within(fetch(client))
    assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
    assert server.heads == []


async def test_tls_certificate_of_another_host_is_rejected(identity: Identity, tls: ssl.SSLContext) -> None:
    server = Server()
    trusting = ssl.create_default_context(cadata=identity.certificate_pem.decode())
    async with listening(server, tls=tls) as port:
        with pytest.raises(UnavailableError, match=r"not valid for '127\.0\.0\.1'"):
            await within(fetch(Http1Client(("127.0.0.1", port), tls=trusting)))
    assert server.heads == []


async def test_tls_to_a_server_without_tls_fails(identity: Identity) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    trusting = ssl.create_default_context(cadata=identity.certificate_pem.decode())
    listener = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with listener:
        client = Http1Client(("localhost", listener.sockets[0].getsockname()[1]), tls=trusting)
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await within(fetch(client))


async def test_refused_connection_is_retried() -> None:
    port, server = free_port(), Server()
    client = Http1Client(("127.0.0.1", port), connect_retries=8, backoff=0.02)
    asking = asyncio.create_task(fetch(client, "POST"))
    try:
        await asyncio.sleep(0.01)  # the first attempt is refused meanwhile
        assert not asking.done()
        async with listening(server, port):
            assert await within(asking) == b"hello"
    finally:
        asking.cancel()
        client.close()
    assert len(server.heads) == 1


async def test_permanently_refused_connection_is_unavailable() -> None:
    loop, client = (
        asyncio.get_running_loop(),
        Http1Client(("127.0.0.1", free_port()), connect_retries=2, backoff=0.02),
    )
    began = loop.time()
    with pytest.raises(UnavailableError, match="cannot be reached: ") as caught:
        await within(fetch(client))
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert loop.time() - began >= 0.06


async def test_every_address_of_a_host_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """An example is localhost where the server listens on IPv4 only."""

    async def two(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, 1, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", two)
    async with listening(Server()) as port:
        client = Http1Client(("some.host", port))
        try:
            assert await within(fetch(client)) == b"hello"
        finally:
            client.close()
    with pytest.raises(UnavailableError) as caught:
        await within(fetch(client))
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


async def test_unknown_host_name_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match="cannot be reached"):
        await within(fetch(Http1Client(("no-such-host.invalid", 80), connect_retries=5, backoff=10)))


async def test_request_that_must_not_be_resent_gets_a_new_connection() -> None:
    server = Server()
    async with listening(server) as port:
        client = Http1Client(("127.0.0.1", port), resend=False)
        try:
            for method in ("GET", "GET", "POST", "POST"):
                assert await within(fetch(client, method)) == b"hello"
        finally:
            client.close()
    assert server.connections == 3


@pytest.mark.promise("P12")
async def test_connection_that_cannot_be_reused_is_not_kept() -> None:
    """At a hundred requests a second, kept ones would hold hundreds of descriptors until they expire."""
    server = Server()
    async with listening(server) as port:
        client = Http1Client(("127.0.0.1", port), resend=False)
        try:
            assert await within(fetch(client, "POST")) == b"hello"
            before = descriptors()
            for _ in range(50):
                assert await within(fetch(client, "POST")) == b"hello"
            assert server.connections == 51
            await until(lambda: descriptors() <= before + 10, "descriptors pile up")
        finally:
            client.close()


@pytest.mark.parametrize(("resend", "posts"), [(True, 2), (False, 1)])
async def test_connection_closed_before_the_answer_is_retried_only_if_allowed(resend: bool, posts: int) -> None:
    """The server closes each connection at its second request, so a reused connection breaks."""
    server = Server(answers=1 if resend else 0)
    async with listening(server) as port:
        client = Http1Client(("127.0.0.1", port), resend=resend)
        try:
            if resend:
                await within(fetch(client, "GET"))
                assert await within(fetch(client, "POST")) == b"hello"
            else:
                with pytest.raises(BadGatewayError, match="without an answer"):
                    await within(fetch(client, "POST"))
        finally:
            client.close()
    assert sum(head.startswith(b"POST") for head in server.heads) == posts


@pytest.mark.parametrize(
    ("address", "secure", "field"),
    [
        (("10.0.0.1", 80), False, b"host: 10.0.0.1\r\n"),
        (("a.example", 443), True, b"host: a.example\r\n"),
        (("a.example", 443), False, b"host: a.example:443\r\n"),
        (("::1", 8000), False, b"host: [::1]:8000\r\n"),
    ],
)
def test_host_header_has_the_port_unless_default(address: tuple[str, int], secure: bool, field: bytes) -> None:
    client = Http1Client(address, tls=ssl.create_default_context() if secure else None)
    assert field in client.request("GET", "/")._message


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "\udcff", "例" * 64])
async def test_invalid_host_name_is_not_connected(host: str) -> None:
    with pytest.raises(UnavailableError, match=r"cannot be reached: .*is not a valid host name"):
        await within(fetch(Http1Client((host, 80))))
