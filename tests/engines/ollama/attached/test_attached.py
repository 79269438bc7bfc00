"""The attached server: probes, connection failures, versions, and the key."""

from __future__ import annotations

import asyncio
import ssl
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.ollama.attached import is_older
from engine_plugin.errors import AuthError, BadGatewayError, PreconditionError, UnavailableError
from engine_plugin.process.ports import free_ports
from engine_plugin.system.certificates import Identity, load_identity
from tests.patience import LIMIT, NEVER, within

from .conftest import attached_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.engines.ollama.contract.handle import ContractServer


@asynccontextmanager
async def peer(answer: bytes | None, tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that answers each request with the same bytes (None: never), and the requests that it received."""
    received: list[bytes] = []
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                received.append(head)
                if answer is None:
                    await over.wait()
                    return
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", received
    finally:
        over.set()
        server.close()


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


async def test_running_server_is_found_with_its_version(contract_server: ContractServer) -> None:
    contract_server.be_version("0.33.1")
    server = attached_server(contract_server.url)
    try:
        first, second = await asyncio.gather(server.find(), server.find())
        assert first is not None
        assert first is second
        assert server.version == "0.33.1"
        assert await server.find() is first
        assert [entry["path"] for entry in contract_server.requests()] == ["/", "/api/version"]
    finally:
        await server.detach()


async def test_closed_port_gives_no_server() -> None:
    [port] = free_ports(1)
    server = attached_server(f"127.0.0.1:{port}", server="attach")
    assert await server.find() is None
    message = str(server.unreachable())
    assert f"no Ollama server answers at http://127.0.0.1:{port} (" in message
    assert "the test" in message


@pytest.mark.parametrize(
    ("address", "command"),
    [
        ("127.0.0.1:11434", "`ollama serve`"),
        ("127.0.0.1:11500", "`OLLAMA_HOST=127.0.0.1:11500 ollama serve`"),
        ("[::1]:11500", "`OLLAMA_HOST=[::1]:11500 ollama serve`"),
        ("10.0.0.7:11434", "`OLLAMA_HOST=0.0.0.0 ollama serve` on 10.0.0.7"),
        ("10.0.0.7:11500", "`OLLAMA_HOST=0.0.0.0:11500 ollama serve` on 10.0.0.7"),
    ],
)
def test_error_has_the_command_that_starts_a_server_at_the_address(
    address: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert command in str(attached_server(address).unreachable())


async def test_silent_server_costs_only_the_probe_timeout() -> None:
    async with peer(None) as (url, received):
        server = attached_server(url, {"ENGINE_PLUGIN_PROBE_TIMEOUT": "0.2"}, probe_timeout=NEVER)
        assert await within(server.find()) is None
        assert len(received) == 1
        assert "no answer in 0.2 s" in str(server.unreachable())


async def test_invalid_probe_timeout_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    for text in ("soon", "-1", "nan", "0"):
        caplog.clear()
        attached_server("127.0.0.1:9", {"ENGINE_PLUGIN_PROBE_TIMEOUT": text})
        assert f"ENGINE_PLUGIN_PROBE_TIMEOUT: {text!r} is not" in caplog.text


@pytest.mark.parametrize(
    "answer", [ok(b"<html>a router</html>"), ok(b'{"version": 7}'), b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n"]
)
async def test_other_http_server_is_not_used(answer: bytes) -> None:
    async with peer(answer) as (url, _):
        server = attached_server(url)
        assert await server.find() is None
        assert "the server there is not Ollama" in str(server.unreachable())


@pytest.mark.promise("P26")
async def test_server_without_http_is_not_used() -> None:
    async with peer(b"220 mail.example.com ESMTP\r\n") as (url, _):
        server = attached_server(url)
        assert await server.find() is None
        assert "does not answer in HTTP" in str(server.unreachable())


async def test_old_server_is_rejected_with_both_versions(contract_server: ContractServer) -> None:
    contract_server.be_version("0.4.7")
    server = attached_server(contract_server.url)
    try:
        with pytest.raises(PreconditionError, match=r"0\.4\.7 is too old; 0\.5\.0 or newer is needed.*Upgrade it"):
            await server.find()
        contract_server.be_version("0.5.0")
        assert await server.find(refresh=True) is not None
    finally:
        await server.detach()


@pytest.mark.parametrize(
    ("found", "wanted", "older"),
    [
        ("0.9.0", "0.10", True),
        ("0.10.0-rc1", "0.10", False),
        ("0.33.0", "0.5.0", False),
        ("0.5", "0.5.0", False),
        ("v0.4", "0.5", True),
        ("1", "0.99.9", False),
        ("0.0.0", "0.5", False),
        ("0.0.0-dirty", "0.5", False),
        ("unknown", "0.5", True),
    ],
)
def test_versions_are_compared_by_number(found: str, wanted: str, *, older: bool) -> None:
    assert is_older(found, wanted) is older


@pytest.mark.promise("F20")
async def test_failed_connection_triggers_a_probe(contract_server: ContractServer, tmp_path: Path) -> None:
    server = attached_server(contract_server.url)
    try:
        client = await server.find()
        assert client is not None
        port = contract_server.port
        contract_server.close()
        assert server.known
        with pytest.raises(UnavailableError, match="no Ollama server answers at"):
            await client.ask("GET", "/api/tags")
        assert not server.known
        assert await server.find() is None
        from tests.engines.ollama.contract.handle import ContractServer as Another

        again = await asyncio.to_thread(Another, tmp_path, port=port)
        try:
            found = await server.find()
            assert found is not None
            assert (await found.ask("GET", "/api/tags"))["models"]
        finally:
            await asyncio.to_thread(again.close)
    finally:
        await server.detach()


async def test_broken_connection_triggers_a_probe(contract_server: ContractServer) -> None:
    server = attached_server(contract_server.url)
    try:
        client = await server.find()
        assert client is not None
        contract_server.fail("hang-up", path="/api/ps", times=2)
        expected = rf"^the Ollama at {contract_server.url} closed the connection .*\. See its log \(.+\), and try"
        with pytest.raises(BadGatewayError, match=expected):
            await client.ask("GET", "/api/ps")
        assert not server.known
        assert await server.find() is client
    finally:
        await server.detach()


@pytest.mark.promise("P5", "P32")
async def test_detach_aborts_requests_and_leaves_the_server(
    contract_server: ContractServer,
) -> None:
    server = attached_server(contract_server.url)
    client = await server.find()
    assert client is not None
    body = b'{"model": "fault-stall:latest", "messages": [{"role": "user", "content": "hi"}]}'
    begun = asyncio.Event()

    async def chat() -> None:
        async with client.request("POST", "/api/chat", body) as response:
            begun.set()
            while await response.read_some():
                pass

    contract_server.add("fault-stall:latest")
    chatting = asyncio.create_task(chat())
    try:
        await asyncio.wait_for(begun.wait(), LIMIT)
        await server.detach()
        with pytest.raises(UnavailableError, match="the engine was stopped while it worked on this request"):
            await asyncio.wait_for(chatting, LIMIT)
    finally:
        chatting.cancel()
    await contract_server.wait("/api/chat", state="left")
    assert contract_server.process.poll() is None
    with pytest.raises(UnavailableError, match="was stopped"):
        await client.ask("GET", "/api/tags")


# The key


@pytest.mark.promise("P21")
@pytest.mark.parametrize(
    ("url", "options", "sent"),
    [
        ("http://127.0.0.1:1", {}, False),
        ("https://localhost", {}, False),
        ("https://ollama.example.com", {}, True),
        ("http://ollama.example.com", {}, False),
        ("http://ollama.example.com", {"allow_plain_http": True}, True),
        ("https://ollama.example.com", {"key_variable": ""}, False),
        ("https://ollama.example.com", {"key_variable": "OTHER"}, False),
    ],
)
def test_key_is_sent_to_remote_https_only(
    url: str, options: dict[str, object], *, sent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server = attached_server(url, {"OLLAMA_API_KEY": "very-secret"}, **options)
    assert server.headers == ({"authorization": "Bearer very-secret"} if sent else {})
    assert "very-secret" not in caplog.text
    assert ("is not sent to" in caplog.text) is (url == "http://ollama.example.com" and not options)


@pytest.mark.promise("P21")
def test_key_invalid_in_a_header_is_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    server = attached_server("https://box", {"OLLAMA_API_KEY": "secret\r\nx: y"})
    assert server.headers == {}
    assert "has characters that a header must not have" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.promise("P21")
async def test_tls_certificate_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate is always verified. SSL_CERT_FILE can add a private one."""
    identity = Identity.create()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_identity(context, identity, tmp_path)
    async with peer(ok(b'{"version": "0.33.0"}'), context) as (plain, received):
        url = plain.replace("http://127.0.0.1", "https://localhost")
        server = attached_server(url)
        assert await server.find() is None
        assert "self-signed certificate" in str(server.unreachable())
        assert not received, "no request is sent before the certificate is verified"
        (tmp_path / "ca.pem").write_bytes(identity.certificate_pem)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        trusting = attached_server(url)
        try:
            assert await trusting.find() is not None
            assert trusting.version == "0.33.0"
        finally:
            await trusting.detach()


async def test_server_that_requires_a_key_names_the_remedy() -> None:
    refusal = b'HTTP/1.1 401 No\r\ncontent-length: 24\r\n\r\n{"error":"unauthorized"}'
    async with peer(refusal) as (url, _):
        server = attached_server(url)
        with pytest.raises(AuthError, match="OLLAMA_API_KEY"):
            await server.find()
