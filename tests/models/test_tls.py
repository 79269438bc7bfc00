"""Downloads over TLS from a server whose certificate nobody signed but itself; it is good for tests only."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine_plugin.download.events import Success
from engine_plugin.errors import PullError
from engine_plugin.models.info import Inspection
from engine_plugin.models.store import FetchPolicy, ModelStore, PullRequest
from tests.models.fakes import digest_of, pull
from tests.models.folderworld import choose
from tests.models.hub import REPOSITORY, hub_server
from tests.models.server import FileServer, Script, file_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

POLICY = FetchPolicy(connect_s=5, stall_s=5, attempts=2, backoff_s=0.01, longest_wait_s=1)
CERTIFICATE = Path(__file__).with_name("self-signed.pem")


@pytest.fixture
def context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    return context


@pytest.fixture
async def secure(data: bytes, context: ssl.SSLContext) -> AsyncIterator[FileServer]:
    async with file_server(data, context) as server:
        yield server


@pytest.mark.promise("P21")
async def test_unknown_certificate_is_rejected_unless_insecure(
    store: ModelStore, secure: FileServer, data: bytes
) -> None:
    assert secure.url().startswith("https://")
    with pytest.raises(PullError, match=r"cannot connect.*SSL_CERT_FILE"):
        await pull(store, PullRequest(secure.url()))
    assert secure.requests == []
    events = await pull(store, PullRequest(secure.url(), insecure=True))
    assert events[-1] == Success("model", len(data), f"sha256:{digest_of(data)}")


async def test_a_certificate_of_your_own_is_trusted(
    store: ModelStore, secure: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    assert isinstance((await pull(store, PullRequest(secure.url())))[-1], Success)


async def test_redirect_from_https_to_http_is_rejected_unless_insecure(
    store: ModelStore, secure: FileServer, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    secure.redirects["/model.gguf"] = server.url("/storage?signature=hidden")
    with pytest.raises(PullError, match="from https to http") as caught:
        await pull(store, PullRequest(secure.url()))
    assert "hidden" not in caught.value.message
    assert server.requests == []
    assert isinstance((await pull(store, PullRequest(secure.url(), insecure=True)))[-1], Success)


@pytest.mark.promise("P21")
@pytest.mark.parametrize("hub_name", ["hf", "ms"])
async def test_hub_with_unknown_certificate_is_rejected(
    root: Path, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, hub_name: str
) -> None:
    async def inspect(_: Path) -> Inspection:
        return Inspection("chat")

    async with hub_server(context) as hub:
        environ = {"HF_ENDPOINT": hub.url(""), "MODELSCOPE_ENDPOINT": hub.url("")}
        store = ModelStore(root, inspect=inspect, choose=choose, policy=POLICY, environ=environ)
        source = f"{hub_name}:{REPOSITORY}"
        with pytest.raises(PullError, match=r"cannot connect.*SSL_CERT_FILE"):
            await pull(store, PullRequest(source, password="t0ken"))
        assert hub.requests == []
        assert isinstance((await pull(store, PullRequest(source, insecure=True)))[-1], Success)
        await store.delete(REPOSITORY)
        with pytest.raises(PullError, match="cannot connect"):
            await pull(store, PullRequest(source))
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        assert isinstance((await pull(store, PullRequest(source)))[-1], Success)


@pytest.mark.promise("X11")
@pytest.mark.parametrize("hub_name", ["hf", "ms"])
async def test_a_hubs_list_is_not_followed_from_https_to_http(
    root: Path, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, hub_name: str
) -> None:
    async def inspect(_: Path) -> Inspection:
        return Inspection("chat")

    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    async with hub_server(context) as hub, hub_server() as plain:
        hub.troubles["list"].append(
            Script(status=307, body=b"", headers={"Location": plain.url("/api/x?token=hidden")})
        )
        environ = {"HF_ENDPOINT": hub.url(""), "MODELSCOPE_ENDPOINT": hub.url("")}
        store = ModelStore(root, inspect=inspect, choose=choose, policy=POLICY, environ=environ)
        with pytest.raises(PullError, match="from https to http") as caught:
            await pull(store, PullRequest(f"{hub_name}:{REPOSITORY}"))
        assert "hidden" not in caught.value.message
        assert plain.requests == []
