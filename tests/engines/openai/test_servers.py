"""Adapters: identification, models and differences of each kind of server."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.download.events import ChunkProgress, StepStarted, Success
from engine_plugin.errors import InvalidRequestError, ModelNotFoundError, PullError, UnsupportedError
from engine_plugin.host import events
from engine_plugin.models.request import PullRequest
from tests.patience import LIMIT

if TYPE_CHECKING:
    from engine_plugin.models.info import ModelInfo
    from engine_plugin.plugin import Plugin
    from tests.engines.openai.conftest import Attach, Serve

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


async def call(plugin: Plugin, service: str, **request: Any) -> dict[str, Any]:
    async with asyncio.timeout(LIMIT):
        shape: dict[str, Any] = json.loads(await plugin.invoke(service, json.dumps(request).encode()))
    return shape


async def streamed(plugin: Plugin, service: str, **request: Any) -> list[dict[str, Any]]:
    async with asyncio.timeout(LIMIT), plugin.stream(service, json.dumps(request).encode()) as chunks:
        return [event async for event in events(chunks)]


async def models(plugin: Plugin) -> dict[str, ModelInfo]:
    return {model.name: model for model in await plugin.list_models()}


async def pull(plugin: Plugin, **request: Any) -> list[Any]:
    async with asyncio.timeout(LIMIT), plugin.pull_model(PullRequest(**request)) as events:
        return [event async for event in events]


async def test_vllm_is_identified(serve: Serve, attach: Attach) -> None:
    plugin = attach(await serve("vllm"))
    await plugin.start("")
    assert await plugin.version() == "0.11.0"
    [model] = (await models(plugin)).values()
    assert (model.name, model.kind, model.modified_at.year) == ("qwen3-8b", "chat", 2023)
    assert (model.capabilities.context_length, model.capabilities.context_source) == (40960, "engine")
    assert model.capabilities.features == ("completion", "tools", "thinking"), (
        "from the family, since vLLM reports none"
    )
    assert [one.name for one in await plugin.running_models()] == ["qwen3-8b"]
    assert "vLLM at http://127.0.0.1" in (await plugin.health()).detail


async def test_vllm_services_come_from_its_routes(serve: Serve, attach: Attach) -> None:
    server = await serve("vllm")
    plugin = attach(server)
    with pytest.raises(
        UnsupportedError, match=r"vLLM at http\S+ does not support embed\. It supports: chat, generate"
    ):
        await call(plugin, "embed", input="a")
    assert server.paths == [], "not requested"


async def test_llama_server_is_identified(serve: Serve, attach: Attach) -> None:
    server = await serve("llama-server")
    plugin = attach(server)
    [model] = (await models(plugin)).values()
    assert (model.size, model.details.parameter_size, model.details.format) == (4_912_898_304, "8.03B", "gguf")
    assert model.capabilities.context_length == 8192, "of a slot, not of the training"
    assert model.capabilities.features == ("completion", "tools", "thinking", "vision")
    request = {"query": "a", "documents": ["x", {"text": "y"}, "z"], "top_n": 2, "return_documents": True}
    results = (await call(plugin, "rerank", **request))["results"]
    assert [result["index"] for result in results] == [1, 0]
    assert [result["relevance_score"] for result in results] == pytest.approx([0.8808, 0.5], abs=1e-3)
    assert results[0]["document"] == {"text": "y"}
    assert server.bodies[-1]["documents"] == ["x", "y", "z"]
    with pytest.raises(UnsupportedError, match=r"llama-server at .* does not support text-to-image"):
        await call(plugin, "text-to-image", prompt="a")
    with pytest.raises(UnsupportedError, match="does not support text-to-image"):
        await call(plugin, "text-to-image", prompt="a")
    assert server.paths.count("/v1/images/generations") == 1, "a missing service is remembered"


async def test_missing_option_of_llama_server_is_named(serve: Serve, attach: Attach) -> None:
    server = await serve("llama-server")
    words = "This server does not support embeddings. Start it with `--embeddings`"
    server.refusal = (501, {"error": {"code": 501, "message": words, "type": "not_supported_error"}})
    with pytest.raises(UnsupportedError, match="Start it with `--embeddings`"):
        await call(attach(server), "embed", input="a")


async def test_lm_studio_is_identified(serve: Serve, attach: Attach) -> None:
    server = await serve("lmstudio")
    plugin = attach(server)
    found = await models(plugin)
    gemma, nomic = found["gemma-3"], found["nomic"]
    assert (gemma.kind, gemma.details.family, gemma.details.quantization_level) == ("chat", "gemma3", "Q4_K_M")
    assert gemma.capabilities.features == ("completion", "tools", "vision")
    assert gemma.loaded is not None
    assert gemma.loaded.context_length == 4096
    assert (nomic.kind, nomic.loaded) == ("embed", None)
    assert [model.name for model in await plugin.running_models()] == ["gemma-3"]
    assert (await call(plugin, "embed", input="a"))["model"] == "nomic", "the model of the service's kind"
    await plugin.load_model("gemma-3")
    assert len(server.bodies) == 1
    await plugin.load_model("nomic")
    assert server.bodies[-1] == {"model": "nomic", "input": "a"}


async def test_lm_studio_error_with_status_200_is_raised(serve: Serve, attach: Attach) -> None:
    server = await serve("lmstudio")
    plugin = attach(server, server="other")
    with pytest.raises(UnsupportedError, match="does not support rerank"):
        await call(plugin, "rerank", query="a", documents=["b"], model="gemma-3")


async def test_ovo_answers_tools_without_a_stream(serve: Serve, attach: Attach) -> None:
    server = await serve("ovo")
    plugin = attach(server)
    request = {**HELLO, "tools": TOOLS, "stream_options": {"include_usage": True}}
    told = await streamed(plugin, "chat", **request)
    assert "stream" not in server.bodies[0]
    assert "stream_options" not in server.bodies[0]
    assert told[0]["object"] == "chat.completion.chunk"
    [tool] = told[0]["choices"][0]["delta"]["tool_calls"]
    assert (tool["index"], tool["id"], tool["function"]["name"]) == (0, "c1", "f")
    assert told[1]["choices"][0]["finish_reason"] == "tool_calls"
    assert told[2]["usage"]["total_tokens"] == 3
    assert len(await streamed(plugin, "chat", **HELLO)) == 2
    assert server.bodies[1]["stream"] is True


async def test_fields_that_ovo_ignores_are_logged(
    serve: Serve, attach: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    server = await serve("ovo")
    plugin = attach(server)
    with caplog.at_level(logging.WARNING):
        await call(plugin, "chat", **HELLO, seed=1, stop=["x"], temperature=0.5)
    assert server.bodies == [{**HELLO, "model": "mlx-community/Qwen3-4B-4bit", "temperature": 0.5}]
    assert sorted(record.getMessage() for record in caplog.records) == [
        "seed: OVO ignores this field",
        "stop: OVO ignores this field",
    ]
    with pytest.raises(UnsupportedError, match="response_format: OVO does not support it"):
        await call(plugin, "chat", **HELLO, response_format={"type": "json_object"})


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"error": {"type": "x", "message": "no such thing", "trace": "File secret.py"}}, "no such thing"),
        ({"detail": "no such thing"}, "no such thing"),
        ({"detail": [{"loc": ["body", "messages"], "msg": "is wrong"}]}, "messages: is wrong"),
        ({"detail": [{"loc": 5, "msg": "no such thing"}]}, ": no such thing"),
    ],
)
async def test_each_error_format_is_parsed(serve: Serve, attach: Attach, shape: Any, words: str) -> None:
    server = await serve("ovo")
    server.refusal = (400, shape)
    with pytest.raises(InvalidRequestError, match=words) as caught:
        await call(attach(server), "chat", **HELLO)
    assert "secret" not in str(caught.value)


async def test_ovo_pulls_models(serve: Serve, attach: Attach) -> None:
    server = await serve("ovo")
    plugin = attach(server)
    name = "mlx-community/Other"
    assert await pull(plugin, model=name) == [
        StepStarted(f"pulling {name}"),
        ChunkProgress(name, 10, 40),
        Success(name, 40, ""),
    ]
    assert server.bodies == [{"repo_id": name}]
    server.downloads = [{"status": "failed", "error": "404\x1b[2J\nfrom the hub"}]
    with pytest.raises(PullError, match=r"404 \[2J from the hub"):
        await pull(plugin, model=name)
    here = "mlx-community/Qwen3-4B-4bit"
    assert (await pull(plugin, model=here))[-1] == Success(here, 2_300_000_000, "")


async def test_missing_model_of_ovo_suggests_a_pull(serve: Serve, attach: Attach) -> None:
    server = await serve("ovo")
    server.refusal = (404, {"error": {"message": "model not found: mlx-community/Other"}})
    with pytest.raises(ModelNotFoundError) as caught:
        await call(attach(server), "chat", **HELLO, model="mlx-community/Other")
    assert caught.value.pull == "mlx-community/Other"
    assert "PullModel mlx-community/Other" in str(caught.value)


async def test_missing_model_is_reported_although_the_models_cannot_be_listed(serve: Serve, attach: Attach) -> None:
    server = await serve("ovo")
    plugin = attach(server)
    await plugin.start("")
    server.refusal = (404, {"error": {"message": "model not found: mlx-community/Other"}})
    server.lists_models = False
    with pytest.raises(ModelNotFoundError) as caught:
        await call(plugin, "chat", **HELLO, model="mlx-community/Other")
    assert (caught.value.model, caught.value.pull) == ("mlx-community/Other", "mlx-community/Other")


async def test_ovms_is_identified(serve: Serve, attach: Attach) -> None:
    server = await serve("ovms")
    plugin = attach(server)
    assert await plugin.version() == "2026.1"
    assert len((await call(plugin, "text-to-image", prompt="a", size="64*32", seed=3, model="tiny"))["data"]) == 1
    assert server.paths == ["/v3/images/generations"]
    assert server.bodies == [{"model": "tiny", "prompt": "a", "size": "64x32", "rng_seed": 3}]


async def test_reported_kind_overrides_the_guess(serve: Serve, attach: Attach) -> None:
    server = await serve("ovms")
    told = {"kind": "embed", "capabilities": ["embedding", 7], "max_model_len": 512}
    server.models = [{**server.models[0], **told, "id": "whisper"}, {"id": "tiny-embed", "kind": ["chat"]}]
    found = await models(attach(server))
    assert (found["whisper"].kind, found["whisper"].capabilities.context_length) == ("embed", 512)
    assert found["whisper"].capabilities.features == ("embedding",)
    assert found["tiny-embed"].kind == "embed", "an invalid kind is ignored"


async def test_unidentified_server_is_used(serve: Serve, attach: Attach) -> None:
    server = await serve("gateway", prefix="/llm")
    plugin = attach(server)
    found = await models(plugin)
    assert found["gpt-x"].capabilities.context_length == 64000
    assert {name: model.kind for name, model in found.items()} == {
        "gpt-x": "chat",
        "text-embedding-x": "embed",
        "whisper-1": "speech-to-text",
        "tts-1": "text-to-speech",
    }
    assert await plugin.running_models() == []
    assert (await call(plugin, "chat", **HELLO))["model"] == "gpt-x"
    assert (await call(plugin, "embed", input="a"))["model"] == "text-embedding-x"
    await call(plugin, "text-to-image", prompt="a", model="dall-e-3")
    assert server.bodies[-1]["response_format"] == "b64_json"
    await call(plugin, "text-to-image", prompt="a", model="gpt-image-1")
    assert "response_format" not in server.bodies[-1]


async def test_configured_properties_override_reported_ones(serve: Serve, attach: Attach) -> None:
    known = [{"name": "qwen3*", "context_length": 1000, "capabilities": ["completion"]}]
    [model] = (await models(attach(await serve("vllm"), models=known))).values()
    assert (model.capabilities.context_length, model.capabilities.context_source) == (1000, "configuration")
    assert model.capabilities.features == ("completion",)


async def test_missing_model_is_reported(serve: Serve, attach: Attach) -> None:
    server = await serve("vllm")
    server.refusal = (404, {"error": {"message": "The model `qwen3-8` does not exist.", "type": "NotFoundError"}})
    plugin = attach(server)
    with pytest.raises(ModelNotFoundError, match=r"Did you mean qwen3-8b\?") as caught:
        await call(plugin, "chat", **HELLO, model="qwen3-8")
    assert caught.value.pull == ""
    with pytest.raises(ModelNotFoundError):
        await plugin.load_model("qwen3-8")


@pytest.mark.promise("P32")
async def test_attached_server_is_not_managed(serve: Serve, attach: Attach) -> None:
    server = await serve("vllm")
    plugin = attach(server)
    assert "attached to vLLM" in (await plugin.check()).detail
    with pytest.raises(UnsupportedError, match="with its own commands"):
        await plugin.install(cover=False)
    with pytest.raises(UnsupportedError, match="with its own commands"):
        await plugin.upgrade()
    with pytest.raises(UnsupportedError, match="belongs to vLLM at http"):
        await plugin.delete_model("qwen3-8b")
    with pytest.raises(UnsupportedError, match="vLLM at http"):
        await plugin.unload_model("qwen3-8b")
    with pytest.raises(UnsupportedError, match="does not support pulls"):
        await pull(plugin, model="other")
    assert await pull(plugin, model="qwen3-8b") == [
        StepStarted(f"vLLM at {server.url}/v1 has qwen3-8b"),
        Success("qwen3-8b", 0, ""),
    ]
