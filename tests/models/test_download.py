"""Downloads from a server that answers correctly, or wrongly in ways that no retry mends."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.download.events import ChunkProgress, Success
from engine_plugin.download.remote import Answer, DroppedError, next_url
from engine_plugin.errors import AuthError, EnginePluginError, ModelNotFoundError, PreconditionError, PullError
from engine_plugin.models.store import FetchPolicy, ModelStore, PullRequest
from tests.models.fakes import Inspector, digest_of, files_below, pull
from tests.models.server import FileServer, Script, file_server

if TYPE_CHECKING:
    from pathlib import Path


async def fails(store: ModelStore, request: PullRequest, error: type[EnginePluginError], text: str) -> str:
    with pytest.raises(error, match=text) as caught:
        await pull(store, request)
    return caught.value.message


async def test_a_model_is_downloaded_verified_and_recorded(
    store: ModelStore, server: FileServer, root: Path, data: bytes
) -> None:
    digest = f"sha256:{digest_of(data)}"
    events = await pull(store, PullRequest(server.url("/Some-Model.gguf?token=hidden"), sha256=digest))
    assert events[-1] == Success("Some-Model", len(data), digest)
    progress = [event for event in events if isinstance(event, ChunkProgress)]
    assert progress[-1] == ChunkProgress(digest, len(data), len(data))
    assert [event.completed for event in progress] == sorted(event.completed for event in progress)
    assert (await store.get("Some-Model")).path.read_bytes() == data
    record = json.loads((root / "Some-Model.json").read_text())
    assert record["source"] == server.url("/Some-Model.gguf")
    assert files_below(root) == {"Some-Model.gguf", "Some-Model.json"}
    assert server.requests[0].headers["accept-encoding"] == "identity"


async def test_body_without_content_length_ends_with_the_connection(
    store: ModelStore, server: FileServer, data: bytes
) -> None:
    server.scripts.append(Script(chunked=True))
    events = await pull(store, PullRequest(server.url()))
    assert events[-1] == Success("model", len(data), f"sha256:{digest_of(data)}")


@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag"])
async def test_digest_from_the_server_is_verified(
    store: ModelStore, server: FileServer, data: bytes, header: str
) -> None:
    server.etag = ""
    server.headers = {header: f'"{digest_of(data)}"'}
    events = await pull(store, PullRequest(server.url()))
    assert any(isinstance(event, ChunkProgress) and digest_of(data) in event.digest for event in events)
    server.headers = {header: f'"{"0" * 64}"'}
    message = await fails(store, PullRequest("other", source=server.url()), PullError, "0" * 64)
    assert digest_of(data) in message


async def test_digest_on_a_redirect_is_verified(store: ModelStore, server: FileServer, root: Path) -> None:
    async with file_server(b"") as front:
        front.redirects["/model.gguf"] = server.url("/storage")
        front.headers = {"X-Linked-ETag": f'"{"0" * 64}"'}
        await fails(store, PullRequest(front.url()), PullError, f"expected sha256:{'0' * 64}")
        asked = PullRequest(front.url(), sha256="1" * 64)
        mismatch = f"the server: checksum mismatch: expected sha256:{'1' * 64}, got sha256:{'0' * 64}"
        await fails(store, asked, PullError, mismatch)
    assert files_below(root) == set()


@pytest.mark.promise("F25")
async def test_wrong_digest_fails_and_keeps_nothing(
    store: ModelStore, server: FileServer, root: Path, data: bytes
) -> None:
    message = await fails(store, PullRequest(f"{server.url()}#sha256={'0' * 64}"), PullError, "0" * 64)
    assert digest_of(data) in message
    assert files_below(root) == set()


async def test_present_version_is_not_downloaded_again(store: ModelStore, server: FileServer, data: bytes) -> None:
    await pull(store, PullRequest(server.url()))
    for request in (PullRequest(server.url()), PullRequest(server.url() + "?signed=anew")):
        events = await pull(store, request)
        assert isinstance(events[-1], Success)
        assert not any(isinstance(event, ChunkProgress) for event in events)
    assert len(server.requests) == 3
    await pull(store, PullRequest(server.url(), sha256=digest_of(data)))
    assert len(server.requests) == 3
    record = await store.get("model")
    server.etag, server.data = '"version-2"', data + b"x"
    assert (await pull(store, PullRequest(server.url())))[-1] != Success("model", record.size, record.digest)
    assert (await store.get("model")).size == len(data) + 1


@pytest.mark.promise("P18")
@pytest.mark.parametrize(
    ("script", "error", "text"),
    [
        (Script(status=404), ModelNotFoundError, "there is no such file"),
        (Script(status=410), ModelNotFoundError, "there is no such file"),
        (Script(status=403), AuthError, "refused access"),
        (Script(status=400), PullError, "HTTP 400"),
        (Script(status=501), PullError, "HTTP 501"),
        (Script(status=204), PullError, "HTTP 204"),
        (Script(status=302), PullError, "HTTP 302"),
        (Script(status=429, headers={"Retry-After": "3600"}), PullError, "3600 seconds"),
        (Script(headers={"Content-Type": "text/html; charset=utf-8"}, body=b"<html>"), PullError, "web page"),
        (Script(body=b"Not GGUF at all"), PullError, "does not begin with GGUF"),
        (Script(body=b""), PullError, "the file is empty"),
        (Script(headers={"Content-Encoding": "gzip"}), PullError, "compressed"),
        (Script(status=206, body=b"GGUF", headers={"Content-Range": "bytes 0-3/4"}), PullError, "sent bytes from 0"),
        (Script(status=206, body=b"GGUF"), PullError, "without a valid Content-Range"),
        (Script(status=206, body=b"GGUF", headers={"Content-Range": "bytes 9-3/4"}), PullError, "contradicts itself"),
    ],
)
async def test_answer_without_a_model_fails_at_once(
    store: ModelStore, server: FileServer, root: Path, script: Script, error: type[EnginePluginError], text: str
) -> None:
    server.scripts.append(script)
    await fails(store, PullRequest(server.url()), error, text)
    assert len(server.requests) == 1
    assert files_below(root) == set()


async def test_refused_connection_fails_with_a_hint(store: ModelStore, root: Path, data: bytes) -> None:
    async with file_server(data) as server:
        url = server.url()
    await fails(store, PullRequest(url), PullError, "cannot connect")
    assert files_below(root) == set()


@pytest.mark.promise("P21")
async def test_credentials_are_sent_and_never_shown(
    store: ModelStore, server: FileServer, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.credentials = ("somebody", "s3cr3t-pass")
    with caplog.at_level(logging.DEBUG):
        message = await fails(
            store, PullRequest(server.url(), username="somebody", password="wr0ng"), AuthError, "401"
        )
        assert "wr0ng" not in message
        wrong_digest = PullRequest(
            server.url("/model.gguf?key=s3cr3t-key"), sha256="0" * 64, username="somebody", password="s3cr3t-pass"
        )
        message = await fails(store, wrong_digest, PullError, "expected")
        request = PullRequest(server.url("/model.gguf?key=s3cr3t-key", credentials="somebody:s3cr3t-pass@"))
        events = await pull(store, request)
    stored = "".join((root / file).read_text(errors="replace") for file in files_below(root))
    for secret in ("s3cr3t", server.requests[-1].headers["authorization"].removeprefix("Basic ")):
        assert secret not in caplog.text
        assert secret not in stored
        assert secret not in str(events)
        assert secret not in message


@pytest.mark.promise("P21")
async def test_credentials_are_not_sent_to_another_origin(store: ModelStore, server: FileServer) -> None:
    async with file_server(b"") as front:
        front.credentials = ("me", "pass")
        front.redirects = {"/model.gguf": "/elsewhere", "/elsewhere": server.url("/storage", credentials="x:y@")}
        await pull(store, PullRequest(front.url(), username="me", password="pass"))
        assert [request.path for request in front.requests] == ["/model.gguf", "/elsewhere"]
        assert all("authorization" in request.headers for request in front.requests)
    assert [request.path for request in server.requests] == ["/storage"]
    assert "authorization" not in server.requests[0].headers


@pytest.mark.promise("P21")
async def test_credentials_over_plain_http_are_rejected(store: ModelStore) -> None:
    request = PullRequest("http://models.invalid/x.gguf", username="me", password="pass")
    await fails(store, request, EnginePluginError, "unprotected")


async def test_endless_redirects_fail(store: ModelStore, server: FileServer) -> None:
    server.redirects = {f"/{number}": f"/{number + 1}" for number in range(30)}
    await fails(store, PullRequest("m", source=server.url("/0")), PullError, "more than 10 redirects")
    assert len(server.requests) == 11
    await pull(store, PullRequest("m", source=server.url("/20")))


@pytest.mark.promise("P31")
@pytest.mark.parametrize("location", ["ftp://h/x.gguf", "file:///etc/passwd", "http://h:port/x", "mailto:x"])
async def test_redirect_to_another_scheme_fails(store: ModelStore, server: FileServer, location: str) -> None:
    server.redirects["/model.gguf"] = location
    await fails(store, PullRequest(server.url()), PullError, "redirects to")
    assert len(server.requests) == 1


@pytest.mark.promise("X15")
@pytest.mark.parametrize(
    ("headers", "status", "text"),
    [
        ({"Content-Range": f"bytes 0-{'9' * 5000}/{'9' * 5000}"}, 206, "valid Content-Range"),
        ({"Content-Range": f"bytes */{'9' * 5000}"}, 416, "attempts made no progress"),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, 503, "is busy for"),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 -2359"}, 503, "attempts made no progress|is busy for"),
        ({"Retry-After": "9" * 90}, 503, "busy for 31622400 seconds"),
        ({"Retry-After": "9" * 5000}, 503, "attempts made no progress"),
        ({"Retry-After": "Mon, 99 Foo 1 1:1:1 GMT"}, 503, "attempts made no progress"),
        ({"Location": "http://127.0.0.1:99999/"}, 302, "invalid URL|cannot be asked"),
        ({"Location": "http://127.0.0.1:0x50/"}, 302, "invalid URL"),
        ({"Location": "http://" + "a" * 300 + "/"}, 302, "invalid URL|cannot be asked|cannot connect"),
    ],
)
async def test_contradicting_headers_fail(
    store: ModelStore, server: FileServer, headers: dict[str, str], status: int, text: str
) -> None:
    server.scripts.extend(Script(status=status, headers=dict(headers), body=b"") for _ in range(8))
    await fails(store, PullRequest(server.url()), PullError, text)


HEADERS = ("Content-Range", "Retry-After", "ETag", "Last-Modified", "Location", "Content-Type", "X-Linked-ETag")
ODD = ("", "bytes 5-1/3", "bytes 0-9/10", "bytes */*", "1e999", "//", "http://:0", "https://[", 'W/"x"', "-1", "²")
VALUES = st.sampled_from(ODD) | st.text("abytes 019:/-[].%²\t", max_size=20)


@pytest.mark.promise("X15")
@given(
    status=st.sampled_from([200, 206, 301, 302, 307, 416, 429, 503]),
    headers=st.dictionaries(st.sampled_from(HEADERS), VALUES, max_size=3),
)
def test_any_headers_give_a_file_or_an_error(status: int, headers: dict[str, str]) -> None:
    request = httpx.Request("GET", "http://127.0.0.1/model.gguf")
    raw = [(key.encode(), value.encode("latin-1")) for key, value in headers.items()]
    answer = Answer(httpx.Response(status, headers=raw, request=request), "")
    with suppress(EnginePluginError, DroppedError):
        answer.check_status()
        assert answer.remote().total >= 0
        next_url(request.url, headers.get("Location", "/"), insecure=False)


@pytest.mark.promise("L6")
async def test_offline_environment_rejects_files_of_hugging_face(
    root: Path, inspector: Inspector, policy: FetchPolicy, server: FileServer
) -> None:
    environ = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": server.url("").replace("127.0.0.1", "localhost")}
    store = ModelStore(root, inspect=inspector, policy=policy, environ=environ)
    for url in (
        "https://huggingface.co/o/n/resolve/main/x.gguf",
        f"{environ['HF_ENDPOINT']}/o/n/resolve/main/x.gguf",
    ):
        with pytest.raises(PreconditionError, match="HF_HUB_OFFLINE=1"):
            await pull(store, PullRequest(url))
    assert server.requests == []
    assert isinstance((await pull(store, PullRequest(server.url())))[-1], Success)


@pytest.mark.promise("X15")
@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("ALL_PROXY", "socks5://me:pa55w0rd@127.0.0.1:1", "ALL_PROXY cannot be used"),
        ("HTTP_PROXY", "gopher://me:pa55w0rd@127.0.0.1:1", "HTTP_PROXY or ALL_PROXY cannot be used"),
        ("HTTP_PROXY", "http://me:pa55w0rd@[::1", "HTTP_PROXY or ALL_PROXY cannot be used"),
        ("SSL_CERT_FILE", "/nowhere/ca.pem", "SSL_CERT_FILE or SSL_CERT_DIR cannot be read"),
    ],
)
async def test_invalid_settings_of_the_environment_are_named(
    store: ModelStore, server: FileServer, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, text: str
) -> None:
    monkeypatch.setenv(variable, value)
    message = await fails(store, PullRequest(server.url()), PullError, text)
    assert "pa55w0rd" not in message
