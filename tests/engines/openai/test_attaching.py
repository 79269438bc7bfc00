"""Finding the server, sending the key, and lost or missing servers."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.engines.base import HealthState
from engine_plugin.engines.openai import discovery
from engine_plugin.engines.openai.address import BaseUrl
from engine_plugin.engines.openai.discovery import ServerFinder
from engine_plugin.engines.openai.engine import OpenAIEngine
from engine_plugin.engines.openai.keys import key_headers
from engine_plugin.engines.openai.options import OpenAIOptions
from engine_plugin.errors import (
    AuthError,
    BadGatewayError,
    ManifestError,
    ModelNotFoundError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.protocol.shapes import EngineConfig
from engine_plugin.system.certificates import Identity, load_identity
from tests.engines.openai.conftest import manifest_of
from tests.engines.openai.contract import Contract, free_pair
from tests.engines.openai.test_servers import HELLO, call, models, streamed
from tests.patience import LIMIT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engines.openai.conftest import Attach, Serve

KEY = "sk-only-for-this-test"


@pytest.mark.parametrize(
    ("text", "root", "path"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000", ""),
        ("http://host:8000/", "http://host:8000", ""),
        ("http://host:8000/v1", "http://host:8000", "/v1"),
        ("http://host:8000/v1//", "http://host:8000", "/v1"),
        ("http://host:8000/v3/chat/completions", "http://host:8000", "/v3"),
        ("https://gate.example/llm/v1", "https://gate.example/llm", "/llm/v1"),
        ("https://gate.example:443/openai", "https://gate.example/openai", "/openai"),
        ("HTTP://[::1]:8000/v1", "http://[::1]:8000", "/v1"),
        ("http://0.0.0.0:8000", "http://127.0.0.1:8000", ""),
    ],
)
def test_base_url_is_parsed(text: str, root: str, path: str) -> None:
    base = BaseUrl.parse(text)
    assert (base.root, base.path) == (root, path)


@pytest.mark.parametrize(
    "text", ["ftp://host", "http://", "http://u:p@host", "http://host:port", "http://host?x=1", "http://host:99999"]
)
def test_invalid_base_url_is_rejected(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"."):
        BaseUrl.parse(text)
    with pytest.raises(ManifestError, match="base_url"):
        OpenAIEngine(manifest_of(tmp_path / "p", base_url=text))
    manifest = manifest_of(tmp_path / "q", text)
    [problem] = OpenAIEngine.check_options(manifest)
    assert "provider.engine_host" in problem.what
    with pytest.raises(ManifestError):
        OpenAIEngine(manifest)


@pytest.mark.promise("P21")
@pytest.mark.parametrize(
    ("url", "options", "sent"),
    [
        ("http://127.0.0.1:8000", {}, False),
        ("http://localhost:8000", {}, False),
        ("http://[::1]:8000", {}, False),
        ("http://127.0.0.1:8000", {"send_key": "always"}, True),
        ("https://api.example", {}, True),
        ("https://api.example", {"send_key": "never"}, False),
        ("https://api.example", {"key_variable": "OTHER"}, False),
        ("http://10.0.0.7:8000", {"allow_plain_http": True}, True),
        ("http://10.0.0.7:8000", {"send_key": "never"}, False),
        ("http://127.0.0.1.example:8000", {"allow_plain_http": True}, True),
    ],
)
def test_key_is_sent_as_configured(url: str, options: dict[str, Any], sent: bool) -> None:
    headers = key_headers(OpenAIOptions(**options), {"OPENAI_API_KEY": KEY}, BaseUrl.parse(url))
    assert headers == ({"authorization": f"Bearer {KEY}"} if sent else {})


@pytest.mark.promise("P21")
@pytest.mark.parametrize("host", ["10.0.0.7", "localhost.example", "127.0.0.1.example"])
def test_key_is_not_sent_unencrypted(host: str) -> None:
    with pytest.raises(PreconditionError, match=r"OPENAI_API_KEY would go .* engine\.allow_plain_http") as caught:
        key_headers(OpenAIOptions(), {"OPENAI_API_KEY": KEY}, BaseUrl.parse(f"http://{host}:8000"))
    assert KEY not in str(caught.value)


@pytest.mark.promise("P21")
def test_key_with_invalid_characters_is_rejected() -> None:
    with pytest.raises(PreconditionError, match="OPENAI_API_KEY: the key contains invalid characters") as caught:
        key_headers(OpenAIOptions(), {"OPENAI_API_KEY": f"{KEY}\r\nx: y"}, BaseUrl.parse("https://api.example"))
    assert KEY not in str(caught.value)


@pytest.mark.promise("P21")
async def test_local_server_gets_the_key_if_configured(
    serve: Serve, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve("gateway", key=KEY)
    with pytest.raises(AuthError, match="OPENAI_API_KEY is not set"):
        await attach(server).start("")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(PreconditionError, match="send_key: always"):
        await attach(server).start("")
    plugin = attach(server, send_key="always")
    assert len(await models(plugin)) == 4
    assert (await call(plugin, "chat", **HELLO))["model"] == "gpt-x"
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(AuthError, match=r"refuses the key \(Incorrect API key provided\)") as caught:
        await attach(server, send_key="always").start("")
    assert "wrong" not in str(caught.value)


@pytest.mark.promise("P21")
async def test_key_is_not_sent_to_local_servers_by_default(
    serve: Serve, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = await serve("vllm")
    await call(attach(server), "chat", **HELLO)
    assert not [head for head in server.heads if "Authorization" in head]


@pytest.mark.promise("P21")
async def test_tls_certificate_is_verified(serve: Serve, attach: Attach, tmp_path: Path) -> None:
    identity = Identity.create()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_identity(context, identity, tmp_path)
    server = await serve("gateway", tls=context)
    url = f"https://localhost:{server.port}/v1"
    with pytest.raises(UnavailableError, match=r"self-signed certificate.* engine\.ca_file"):
        await attach(url).start("")
    (tmp_path / "ca.pem").write_bytes(identity.certificate_pem)
    plugin = attach(url, ca_file=str(tmp_path / "ca.pem"))
    assert (await call(plugin, "chat", **HELLO))["model"] == "gpt-x"
    with pytest.raises(PreconditionError, match=r"engine\.ca_file"):
        await attach(url, ca_file=str(tmp_path / "none.pem")).start("")


async def test_server_is_found_at_a_well_known_port(
    serve: Serve, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, other, vllm = free_pair(), await serve("llama-server"), await serve("vllm")
    other.models[0]["id"] = 7  # another program
    monkeypatch.setattr(other, "root", "/elsewhere")
    monkeypatch.setattr(discovery, "WELL_KNOWN_PORTS", {silent: "A", other.port: "B", vllm.port: "C"})
    assert "vLLM" in (await attach("").check()).detail
    await vllm.stop()
    expected = rf"at the ports {silent} \(A\), .*\(no such API at {other.port}\).*engine_host"
    with pytest.raises(UnavailableError, match=expected):
        await attach("").start("")
    await other.stop()
    unattached = attach("")
    with pytest.raises(UnavailableError, match=r"of this machine \(connection refused\)"):
        await unattached.start("")
    assert unattached.engine.config() == EngineConfig(), "no address is reported before the server is found"


def test_config_has_the_address_of_the_server(attach: Attach) -> None:
    config = attach("http://[::1]:8000/v1").engine.config()
    assert (config["host"], config["scheme"], config["origin"]) == ("[::1]:8000", "http", "http://[::1]:8000")


async def test_loading_server_is_reported(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server reports it for each request, or only for those to its model."""
    listed = json.dumps({"data": [{"id": "m"}]}).encode()
    loading = json.dumps({"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}).encode()
    lists = False

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        get = (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /v1/models")
        status, body = (b"200 OK", listed) if get and lists else (b"503 X", loading)
        writer.write(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)
        writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        expected = (
            rf"the server at http://127\.0\.0\.1:{port}\S* is still loading its model \(Loading model\)\. Try again"
        )
        plugin = attach(f"http://127.0.0.1:{port}/v1")
        with pytest.raises(UnavailableError, match=expected):
            await plugin.start("")
        monkeypatch.setattr(discovery, "WELL_KNOWN_PORTS", {port: "A"})
        with pytest.raises(UnavailableError, match=expected):
            await attach("").start("")
        lists = True
        await plugin.start("")
        with pytest.raises(UnavailableError, match=expected):
            await call(plugin, "chat", **HELLO)
        lists = False
        assert re.search(expected, (await plugin.engine.health()).detail)


@pytest.mark.parametrize("stream", [False, True])
async def test_broken_connection_is_attributed_to_the_server(attach: Attach, stream: bool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /v1/models"):
            body = json.dumps({"data": [{"id": "m"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\n{")
        writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listener:
        at = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        plugin = attach(f"{at}/v1")
        ask = streamed if stream else call
        expected = rf"^the server at {at}/v1 broke off in the middle of its answer\. Its log may show why\. Try"
        with pytest.raises(BadGatewayError, match=expected):
            await ask(plugin, "chat", **HELLO)


async def test_missing_server_is_reported_with_its_address(attach: Attach) -> None:
    port = free_pair()
    plugin = attach(f"http://127.0.0.1:{port}/v1")
    check = await plugin.check()
    assert check.installed
    assert "no installation is needed, but" in check.detail
    expected = rf"no OpenAI-compatible server answers at http://\S+:{port}/v1 \(Connection refused\)\. Start it"
    with pytest.raises(UnavailableError, match=expected):
        await plugin.start("")
    with pytest.raises(UnavailableError, match=expected):
        await call(plugin, "chat", **HELLO)
    assert (await plugin.engine.health()).state is HealthState.DEAD


async def test_silent_server_times_out(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(discovery.PROBE_TIMEOUT, "0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        plugin = attach(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        with pytest.raises(UnavailableError, match=r"no answer within 0\.1 s"):
            await plugin.start("")


@pytest.mark.promise("F20", "P32")
async def test_restarted_server_is_found_again(serve: Serve, attach: Attach) -> None:
    server = await serve("vllm")
    plugin = attach(server, connect_retries=0)
    await call(plugin, "chat", **HELLO)
    await server.stop()
    with pytest.raises(UnavailableError, match=r"no vLLM answers at .* Start it: vllm serve MODEL"):
        await call(plugin, "chat", **HELLO)
    assert (await plugin.engine.health()).state is HealthState.DEAD
    await server.start(server.port)
    assert (await call(plugin, "chat", **HELLO))["model"] == "qwen3-8b"
    assert (await plugin.health()).state is HealthState.READY


async def test_refused_connection_is_retried(serve: Serve, attach: Attach) -> None:
    server = await serve("vllm")
    plugin = attach(server, connect_retries=8)
    await call(plugin, "chat", **HELLO)
    await server.stop()
    calling = asyncio.create_task(call(plugin, "chat", **HELLO))
    await asyncio.sleep(0.03)
    await server.start(server.port)
    assert (await calling)["model"] == "qwen3-8b"
    assert len(server.bodies) == 2


async def test_request_is_never_sent_twice(attach: Attach) -> None:
    """The server accepts the request and exits without an answer."""
    posts = 0

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal posts
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            posts += 1
        elif head.startswith(b"GET /v1/models"):
            body = json.dumps({"data": [{"id": "m"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    listener = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    async with listener:
        plugin = attach(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1")
        with pytest.raises(Exception, match="without an answer"):
            await call(plugin, "chat", **HELLO)
    assert posts == 1


@pytest.mark.promise("P7", "P32")
async def test_stop_disconnects(serve: Serve, attach: Attach) -> None:
    server = await serve("vllm")
    plugin = attach(server)
    await call(plugin, "chat", **HELLO)
    await plugin.stop()
    with pytest.raises(UnavailableError, match="StartEngine"):
        await call(plugin, "chat", **HELLO)
    assert (await plugin.engine.health()).state is HealthState.DEAD
    assert list(await models(plugin)) == ["qwen3-8b"], "finding needs no slot"
    await plugin.start("gpu")
    assert (await call(plugin, "chat", **HELLO))["model"] == "qwen3-8b"


async def test_concurrent_calls_find_the_server_once(serve: Serve, attach: Attach) -> None:
    server = await serve("vllm")
    plugin = attach(server)
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*(call(plugin, "chat", **HELLO) for _ in range(20)))
    assert len(server.bodies) == 20
    assert len([head for head in server.heads if "Content-Length" not in head]) == 1


@pytest.mark.promise("P8")
async def test_parallel_limits_concurrent_requests(serve: Serve, attach: Attach) -> None:
    server = await serve("vllm")
    server.gate.clear()
    plugin = attach(server, parallel=1, max_queue=0)
    first = asyncio.create_task(call(plugin, "chat", **HELLO))
    async with asyncio.timeout(LIMIT):
        await server.asked.wait()
        with pytest.raises(UnavailableError, match="busy"):
            await call(plugin, "chat", **HELLO)
        server.gate.set()
        assert (await first)["model"] == "qwen3-8b"


@pytest.mark.parametrize(("status", "words"), [(302, "redirection"), (500, "it answers 500: oh no")])
async def test_error_status_of_the_model_list_is_reported(attach: Attach, status: int, words: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 {status} X\r\nlocation: https://elsewhere.example/\r\ncontent-length: 5\r\n\r\n"
        writer.write(head.encode() + b"oh no")
        writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listener:
        with pytest.raises(UnavailableError, match=words):
            await attach(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}").start("")


async def test_server_without_a_model_list_is_used(attach: Attach) -> None:
    server = Contract("gateway")
    server.models = []
    await server.start()
    try:
        plugin = attach(server)
        assert await models(plugin) == {}
        assert (await call(plugin, "chat", **HELLO, model="any"))["model"] == "any"
    finally:
        await server.stop()


async def test_server_that_is_loading_its_models_is_listed_again(attach: Attach) -> None:
    server = Contract("gateway")
    all_models, server.models = server.models, server.models[:1]
    await server.start()
    try:
        plugin = attach(server)
        await plugin.start("")
        assert list(await models(plugin)) == ["gpt-x"]
        server.models = all_models
        assert len(await models(plugin)) == 4, "the list is requested each time"
        server.models = []
        assert await models(plugin) == {}
        server.models = all_models
        assert (await call(plugin, "embed", input="a"))["model"] == "text-embedding-x", (
            "a missing model requests the list again"
        )
    finally:
        await server.stop()


async def test_suggestions_for_a_missing_model_are_current(serve: Serve, attach: Attach) -> None:
    server = await serve("vllm")
    plugin = attach(server)
    await plugin.start("")
    server.models = [{**server.models[0], "id": "llama-8b"}]
    server.refusal = (404, {"error": {"message": "The model `llama-8` does not exist."}})
    with pytest.raises(ModelNotFoundError, match=r"Did you mean llama-8b\?"):
        await call(plugin, "chat", **HELLO, model="llama-8")
    server.refusal = None
    assert (await call(plugin, "chat", **HELLO))["model"] == "llama-8b"


async def test_what_calls_found_missing_is_kept_for_a_while(serve: Serve) -> None:
    server = await serve("gateway")
    finder = ServerFinder(OpenAIOptions(), server.url, {})
    first = await finder.find()
    first.missing_services.add("embed")
    first.text_only_models.add("whisper-1")
    again = await finder.find(first)
    assert not again.has("embed")
    assert again.text_only_models == {"whisper-1"}
    again.learned -= discovery.STALE_AFTER
    later = await finder.find(again)
    assert later.has("embed")
    assert not later.text_only_models


async def test_what_calls_found_missing_does_not_apply_to_another_kind_of_server(serve: Serve) -> None:
    server = await serve("gateway")
    server.models = [{"id": "m"}]
    finder = ServerFinder(OpenAIOptions(), server.url, {})
    first = await finder.find()
    first.missing_services.add("embed")
    server.models = [{"id": "m", "owned_by": "llamacpp"}]
    again = await finder.find(first)
    assert again.names == first.names
    assert again.server.name == "llama-server"
    assert again.has("embed")


async def test_start_forgets_what_calls_found_missing(serve: Serve, attach: Attach) -> None:
    server = await serve("gateway")
    plugin = attach(server)
    server.refusal = (404, {"detail": "Not Found"})
    with pytest.raises(UnsupportedError):
        await call(plugin, "embed", input="a")
    server.refusal = None
    await models(plugin)
    with pytest.raises(UnsupportedError):
        await call(plugin, "embed", input="a")
    await plugin.start("")
    assert (await call(plugin, "embed", input="a"))["data"]


async def test_replaced_server_is_identified_again(serve: Serve, attach: Attach) -> None:
    first = await serve("vllm")
    plugin = attach(first)
    await call(plugin, "chat", **HELLO)
    await first.stop()
    await serve("llama-server", port=first.port)
    assert list(await models(plugin)) == ["m.gguf"]
    assert "llama-server" in (await plugin.check()).detail
