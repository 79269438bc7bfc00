"""A connection through the TLS relay, between misbehaving clients and a server that the test plays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import sys
from typing import TYPE_CHECKING

import pytest

from engine_plugin.goplugin import pipe as pipe_module
from engine_plugin.goplugin.pipe import Pipe, Pipes
from engine_plugin.goplugin.tls import outer_context
from engine_plugin.system.certificates import Identity
from tests.goplugin.tls_client import TlsClient, client_context, host_identity
from tests.patience import pace, within

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the test's server is at a unix socket")

MUCH = os.urandom(1 << 20) * 24  # more than all buffers between the ends hold


class Relay:
    """A server behind TLS, and the identity that a host needs to connect."""

    def __init__(self, directory: Path) -> None:
        self.inside, self.outside = directory / "inside", directory / "outside"
        self.identity = Identity.create()
        self.host = host_identity()
        self.context = client_context(self.host, self.identity.certificate)
        self.arrived: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        trusted = frozenset({self.host.certificate})
        self.pipes = Pipes(
            outer_context(self.identity, trusted, directory),
            trusted,
            lambda protocol: loop.create_unix_connection(protocol, str(self.inside)),
        )

    async def connect(self, context: ssl.SSLContext | None = None) -> TlsClient:
        return await TlsClient.connect(f"unix:{self.outside}", context or self.context)

    async def let_in(self) -> tuple[TlsClient, asyncio.StreamReader, asyncio.StreamWriter]:
        """A client whose handshake is done, and the server's end of its relay."""
        client = await self.connect()
        await client.shake()
        reader, writer = await within(self.arrived.get())
        return client, reader, writer

    async def arrive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.arrived.put_nowait((reader, writer))

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Relay]:
        loop = asyncio.get_running_loop()
        server = await asyncio.start_unix_server(self.arrive, self.inside, limit=1 << 16)
        front = await loop.create_unix_server(lambda: Pipe(self.pipes), str(self.outside))
        try:
            yield self
        finally:
            front.close()
            await within(self.pipes.close(0))
            server.close()


@pytest.fixture
async def relay(short_dir: Path) -> AsyncIterator[Relay]:
    relay = Relay(short_dir)
    async with relay.open():
        yield relay


async def ended(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await within(writer.wait_closed())


async def refused(client: TlsClient) -> None:
    """Assert that the client's handshake fails, at once or, with TLS 1.3, when it reads."""
    async with client:
        with pytest.raises((ssl.SSLError, OSError)):  # noqa: PT012 - the one or the other
            await client.shake()
            if not await client.read():
                raise ConnectionError("the server has hung up")
        await client.hung_up()


@pytest.mark.promise("G37", "G38", "G39")
async def test_host_connects_with_a_p521_certificate(relay: Relay) -> None:
    """With a certificate on P-521, which grpcio alone could not verify."""
    client, reader, writer = await relay.let_in()
    async with client:
        assert client.tls.version() in ("TLSv1.3", "TLSv1.2")
        assert client.tls.selected_alpn_protocol() == "h2"
        assert client.tls.getpeercert(binary_form=True) == relay.identity.certificate
        await client.send(b"there")
        assert await within(reader.readexactly(5)) == b"there"
        writer.write(b"and back")
        assert await client.read() == b"and back"
        await ended(writer)
        assert await client.read_all() == b""
    await within(relay.pipes.close(5))


@pytest.mark.promise("G7", "G37")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_other_certificates_are_rejected(relay: Relay, version: ssl.TLSVersion) -> None:
    """Not with the same name, not with the host's own signature, not with an old certificate of another."""
    strangers = (None, host_identity(), host_identity(relay.host), Identity.create())
    for stranger in strangers:
        context = client_context(stranger, relay.identity.certificate)
        context.minimum_version = context.maximum_version = version
        await refused(await relay.connect(context))
    for alpn in ("", "http/1.1"):
        await refused(await relay.connect(client_context(relay.host, relay.identity.certificate, alpn)))
    await within(relay.pipes.close(5))
    assert relay.arrived.empty()


async def test_expired_host_certificate_is_rejected(short_dir: Path) -> None:
    from datetime import timedelta

    relay = Relay(short_dir)
    old = host_identity(lasts=timedelta(days=-1))
    trusted = frozenset({old.certificate})
    relay.pipes = Pipes(outer_context(relay.identity, trusted, short_dir), trusted, relay.pipes.dial)
    async with relay.open():
        await refused(await relay.connect(client_context(old, relay.identity.certificate)))


@pytest.mark.promise("G7")
async def test_old_tls_version_is_rejected(relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(DeprecationWarning, match="TLSv1 is deprecated"):
        relay.context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
        relay.context.maximum_version = ssl.TLSVersion.TLSv1_1
    relay.context.set_ciphers("ALL:@SECLEVEL=0")
    await refused(await relay.connect())
    assert "unsupported protocol" in caplog.text


@pytest.mark.promise("G25")
@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
async def test_malformed_handshake_is_rejected(relay: Relay, sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """A client that connects and leaves, as a host that reattaches does, causes no warning."""
    reader, writer = await asyncio.open_unix_connection(str(relay.outside))
    writer.write(sent)
    writer.write_eof()
    answer = await within(reader.read())
    assert answer[:1] in (b"", b"\x15")  # an alert at most
    await ended(writer)
    await within(relay.pipes.close(5))
    assert ("was rejected" in caplog.text) is (len(sent) > 3)


@pytest.mark.promise("G7")
async def test_silent_client_is_disconnected(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe_module, "_HANDSHAKE", 0.1)
    async with await relay.connect() as client:
        assert await client.hung_up() == b""


@pytest.mark.promise("G7")
async def test_many_silent_clients_do_not_block_the_host(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe_module, "_STRANGERS", 3)
    monkeypatch.setattr(pipe_module, "_HANDSHAKE", 1000.0)
    async with contextlib.AsyncExitStack() as clients:
        silent = [await clients.enter_async_context(await relay.connect()) for _ in range(5)]
        for client in silent[:2]:
            with contextlib.suppress(ConnectionResetError):
                assert await client.hung_up() == b""
        client, _, writer = await relay.let_in()
        await clients.enter_async_context(client)
        writer.write(b"still there")
        assert await client.read() == b"still there"
        await ended(writer)


@pytest.mark.promise("G39")
async def test_large_transfers_run_in_both_directions_at_once(relay: Relay) -> None:
    client, reader, writer = await relay.let_in()

    async def answer() -> None:
        writer.write(MUCH)
        await writer.drain()

    async def read() -> bytes:
        data = bytearray()
        while len(data) < len(MUCH):
            data += await client.read()
        return bytes(data)

    async with client:
        answering = asyncio.create_task(answer())
        sending = asyncio.create_task(client.send(MUCH))
        arrived, came_back = await within(asyncio.gather(reader.readexactly(len(MUCH)), read()))
        assert arrived == MUCH
        assert came_back == MUCH
        await within(asyncio.gather(answering, sending))
        await ended(writer)


@pytest.mark.promise("G39")
async def test_slow_server_holds_the_host_back(relay: Relay) -> None:
    """The relay between them buffers a bounded amount."""
    client, reader, writer = await relay.let_in()
    async with client:
        sending = asyncio.create_task(client.send(MUCH))
        _, late = await asyncio.wait({sending}, timeout=pace(0.2))
        assert late
        [pipe] = relay.pipes.open
        assert 0 < pipe.inside.transport.get_write_buffer_size() < 1 << 20
        assert await within(reader.readexactly(len(MUCH))) == MUCH
        await within(sending)
        await ended(writer)


@pytest.mark.promise("G39")
async def test_slow_host_holds_the_server_back(relay: Relay) -> None:
    client, _, writer = await relay.let_in()
    async with client:
        writer.write(MUCH)
        draining = asyncio.create_task(writer.drain())
        _, late = await asyncio.wait({draining}, timeout=pace(0.2))
        assert late
        [pipe] = relay.pipes.open
        assert 0 < pipe.transport.get_write_buffer_size() < 1 << 20
        data = bytearray()
        while len(data) < len(MUCH):
            data += await client.read()
        assert data == MUCH
        await within(draining)
        await ended(writer)


@pytest.mark.promise("G39")
async def test_half_closed_connection_still_answers(relay: Relay) -> None:
    """The server reads the end of the request and can still answer."""
    client, reader, writer = await relay.let_in()
    async with client:
        await client.send(b"all I have to say")
        await client.farewell()
        assert await within(reader.read()) == b"all I have to say"
        writer.write(MUCH)
        writer.close()
        assert await client.read_all() == MUCH
        assert await client.hung_up() == b""
    await within(relay.pipes.close(5))


@pytest.mark.promise("G39")
async def test_aborted_host_connection_is_closed(relay: Relay) -> None:
    client, reader, writer = await relay.let_in()
    await client.send(b"in the middle of")
    client.cut()
    with contextlib.suppress(ConnectionResetError):
        assert await within(reader.read()) == b"in the middle of"
    await ended(writer)
    await client.close()
    await within(relay.pipes.close(5))


@pytest.mark.promise("G39")
async def test_tampered_bytes_end_the_connection(relay: Relay) -> None:
    """They are not forwarded."""
    client, reader, writer = await relay.let_in()
    client.tls.write(b"true")
    record = bytearray(client.to_send.read())
    record[-1] ^= 1
    client.writer.write(record)
    with contextlib.suppress(ConnectionResetError):
        assert await within(reader.read()) == b""
    await ended(writer)
    await client.close()
    await within(relay.pipes.close(5))


async def test_missing_inner_server_ends_the_connection(relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    relay.inside.unlink()
    async with await relay.connect() as client:
        await client.shake()
        await client.hung_up()
    assert "takes no connection" in caplog.text


async def test_rejected_client_that_stays_is_disconnected(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe_module, "_LEAVING", 0.1)
    async with await relay.connect() as client:
        client.writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await client.hung_up()
        [pipe] = relay.pipes.open
        await within(pipe.closed)
    assert relay.pipes.open == set()


@pytest.mark.promise("G39")
async def test_tls_sessions_are_not_resumed(relay: Relay) -> None:
    """No session of an earlier one is taken up again: no client gets a ticket for that."""
    relay.context.minimum_version = ssl.TLSVersion.TLSv1_3
    first, _, writer = await relay.let_in()
    writer.write(b"x")
    assert await first.read() == b"x"
    again = await relay.connect()
    if first.tls.session is not None:
        again.tls.session = first.tls.session
    await again.shake()
    _, another = await within(relay.arrived.get())
    assert not again.tls.session_reused
    for client, end in ((first, writer), (again, another)):
        await ended(end)
        await client.close()


async def test_closed_listener_keeps_established_connections(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe_module, "_HANDSHAKE", 1000.0)
    client, _, writer = await relay.let_in()
    silent = await relay.connect()
    async with client, silent:
        relay.pipes.shut()
        async with await relay.connect() as late:
            for outsider in (silent, late):
                with contextlib.suppress(ConnectionResetError):
                    assert await outsider.hung_up() == b""
        writer.write(b"still there")
        assert await client.read() == b"still there"
        await ended(writer)


@pytest.mark.parametrize("when", ["silent", "dialling", "open"])
async def test_close_ends_every_connection(relay: Relay, when: str) -> None:
    """In every phase of a connection, and with data in flight."""
    client = await relay.connect()
    if when != "silent":
        await client.shake()
    if when == "open":
        reader, writer = await within(relay.arrived.get())
        writer.write(MUCH)
    await within(relay.pipes.close(0))
    assert relay.pipes.open == set()
    await client.close()
    if when == "open":
        with contextlib.suppress(ConnectionResetError):
            assert await within(reader.read()) == b""
        await ended(writer)
    elif when == "dialling" and not relay.arrived.empty():
        await ended(relay.arrived.get_nowait()[1])
