"""No request stops the plugin, and each rejection names the field."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import EnginePluginError
from engine_plugin.host.streams import StreamedCall
from engine_plugin.protocol.stubs import provider_pb2 as pb
from tests.patience import LIMIT

from .running import HELLO

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .running import RunningPlugin

pytestmark = pytest.mark.asyncio(loop_scope="module")

TRAVERSALS = [
    "../../etc/passwd",
    "..",
    "/etc/passwd",
    "a/../b",
    "a\\b",
    "",
    "\0",
    "x" * 5000,
    "tiny-chat-gguf\n",
    "CON",
    ".partial",
]

GARBAGE = [b"", b"\xff\xfe\x00", b"[]", b"null", b"{", b'{"model":5}', b'{"a":NaN}', b'{"a":' * 5000, b"[" * 100_000]


async def code_of(running: RunningPlugin, rpc: str, message: Any) -> tuple[int, str]:
    """The code and the message of a unary answer."""
    async with running.link() as link:
        response = await link.answer(link.open(rpc, message, timeout=LIMIT))
    return response.code, response.message


async def well(running: RunningPlugin) -> None:
    assert (await running.client.invoke("chat", HELLO))["choices"]


@pytest.mark.promise("P23")
@pytest.mark.parametrize("data", GARBAGE, ids=lambda data: repr(data[:12]))
async def test_invalid_service_request_is_rejected(shared: RunningPlugin, data: bytes) -> None:
    for service in ("chat", "generate", "embed", "rerank"):
        request = pb.InvokeServiceRequest(service_name=service, request_data=data)
        code, message = await code_of(shared, "InvokeService", request)
        assert code == 400
        assert message.startswith(("request_data: ", "messages: ", "prompt: ", "input: ", "query: ", "model: "))
        async with shared.link() as link:
            parts = [part async for part in StreamedCall(link, "InvokeServiceStream", LIMIT, request, checked=False)]
        assert len(parts) == 1
        assert parts[0].is_final
        assert parts[0].code in ((400, 501) if service in ("embed", "rerank") else (400,))
    await well(shared)


@pytest.mark.promise("P23")
@pytest.mark.parametrize("rpc", ["PullModel", "DeleteModel", "LoadModel", "UnloadModel"])
@pytest.mark.parametrize("data", GARBAGE, ids=lambda data: repr(data[:12]))
async def test_invalid_model_request_is_rejected(shared: RunningPlugin, rpc: str, data: bytes) -> None:
    message_class = getattr(pb, f"{rpc}Request")
    code, message = await code_of(shared, rpc, message_class(request_json=data))
    assert code == 400
    assert message.startswith(("request_json: ", "model: ", "models: "))


@pytest.mark.promise("P20")
@pytest.mark.parametrize("name", TRAVERSALS, ids=repr)
async def test_invalid_model_name_is_rejected(shared: RunningPlugin, name: str) -> None:
    before = sorted(path.name for path in shared.engine.store.root.iterdir())
    for rpc in ("DeleteModel", "LoadModel"):
        data = json.dumps({"model": name}).encode()
        code, message = await code_of(shared, rpc, getattr(pb, f"{rpc}Request")(request_json=data))
        assert code in (400, 404), message
        assert message.startswith("model: ")
        assert len(message) < 1000
    data = json.dumps({"models": [name]}).encode()
    code, message = await code_of(shared, "UnloadModel", pb.UnloadModelRequest(request_json=data))
    assert code in (400, 404)
    data = json.dumps(HELLO | {"model": name}).encode()
    request = pb.InvokeServiceRequest(service_name="chat", request_data=data)
    code, message = await code_of(shared, "InvokeService", request)
    assert code == (200 if name == "" else 404), message  # "" selects the default
    assert sorted(path.name for path in shared.engine.store.root.iterdir()) == before


@pytest.mark.parametrize("service", ["nope", "Chat", "../chat", "chat ", "x" * 5000, "\0"])
async def test_unknown_service_is_rejected(shared: RunningPlugin, service: str) -> None:
    request = pb.InvokeServiceRequest(service_name=service, request_data=b"{}")
    code, message = await code_of(shared, "InvokeService", request)
    assert code == 404
    assert "it declares: chat, generate, embed, rerank" in message


async def test_request_of_a_hundred_megabytes_is_survived(shared: RunningPlugin) -> None:
    big = b'{"messages":[{"role":"user","content":"' + b"x" * (100 << 20) + b'"}]}'
    request = pb.InvokeServiceRequest(service_name="chat", request_data=big)
    code, message = await code_of(shared, "InvokeService", request)
    assert code == 400
    too_large = message.startswith("request_data: the engine refuses it: ") and message.endswith("Too Large")
    assert too_large or "rendering it takes more than" in message, message  # on a busy machine
    await well(shared)


@pytest.mark.promise("P23")
@pytest.mark.parametrize("depth", [100, 900])
async def test_deep_nesting_does_not_crash_the_engine(shared: RunningPlugin, depth: int) -> None:
    """In fields that the engine processes recursively: schemas and messages."""
    pid = await shared.engine_pid("tiny-chat-gguf") if await shared.loaded() else None
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth // 3):
        schema = {"type": "object", "properties": {"a": schema}}
    deep: Any = "a"
    for _ in range(depth):
        deep = [deep]
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for fields in (
        {"response_format": format_, "max_tokens": 1},
        {"anything": deep},
        {"chat_template_kwargs": {"a": deep}},
    ):
        data = json.dumps(HELLO | {"max_tokens": 1} | fields).encode()
        request = pb.InvokeServiceRequest(service_name="chat", request_data=data)
        code, message = await code_of(shared, "InvokeService", request)
        assert code in (200, 400), message
    await well(shared)
    assert pid in (None, await shared.engine_pid("tiny-chat-gguf"))


@pytest.mark.promise("P24")
async def test_two_hundred_concurrent_calls_of_all_kinds_end(shared: RunningPlugin) -> None:
    client = shared.client
    kinds: list[Callable[[], Awaitable[object]]] = [
        lambda: client.invoke("chat", HELLO | {"max_tokens": 3}),
        lambda: client.invoke("generate", {"prompt": ["a", "b"], "max_tokens": 2}),
        lambda: client.invoke("embed", {"input": ["a", "b"]}),
        lambda: client.invoke("rerank", {"query": "a", "documents": ["b", "c"]}),
        lambda: client.invoke("chat", HELLO | {"model": "nope"}),
        lambda: client.invoke("chat", b"\xff"),
        lambda: stream_some(shared, whole=True),
        lambda: stream_some(shared, whole=False),
        client.list_models,
        client.running_models,
        client.health_check,
        lambda: client.load_model("tiny-embed-gguf"),
        lambda: client.start_engine("daemon"),
        client.get_version,
    ]
    # 3 has no divisor in common with their number: neighbours differ in kind.
    calls = [kinds[number * 3 % len(kinds)]() for number in range(200)]
    async with asyncio.timeout(LIMIT):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert all(isinstance(failure, EnginePluginError) and failure.code in (400, 404) for failure in failed), failed
    assert len(failed) == sum(number * 3 % len(kinds) in (4, 5) for number in range(200))
    assert len(shared.servers()) == 3
    await well(shared)


async def stream_some(shared: RunningPlugin, *, whole: bool) -> None:
    """Read a stream to its end, or cancel it after the first chunk."""
    async with shared.client.stream("chat", HELLO | {"max_tokens": 20}) as chunks:
        async for chunk in chunks:
            assert chunk
            if not whole:
                break
