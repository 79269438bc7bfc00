"""The models of a server: names, kinds, capabilities, defaults, loading and deletion."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from engine_plugin.engines.ollama.models import ServerModels, full_name
from engine_plugin.engines.ollama.options import OllamaOptions
from engine_plugin.errors import ModelNotFoundError, ModelNotLoadedError
from engine_plugin.models.capabilities import ModelOverride

from .conftest import attached_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from engine_plugin.engines.ollama.client import OllamaClient
    from tests.engines.ollama.contract.handle import ContractServer


def models_with(**options: object) -> ServerModels:
    return ServerModels(OllamaOptions(**options))  # type: ignore[arg-type]  # as read_options does


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("llama3.2", "llama3.2:latest"),
        ("Llama3.2:1B", "llama3.2:1b"),
        ("library/llama3.2", "llama3.2:latest"),
        ("registry.ollama.ai/library/llama3.2:1b", "llama3.2:1b"),
        ("someone/special", "someone/special:latest"),
        ("box:5000/some/model", "box:5000/some/model:latest"),
        ("hf.co/owner/Repo:Q4_K_M", "hf.co/owner/repo:q4_k_m"),
    ],
)
def test_equivalent_names_have_one_full_name(name: str, full: str) -> None:
    assert full_name(name) == full


async def test_list_has_kinds_capabilities_and_sizes(shared_client: OllamaClient) -> None:
    found = {model.name: model for model in await models_with().all(shared_client)}
    assert list(found) == sorted(found)
    think, embed = found["think:8b"], found["embed:latest"]
    assert (think.kind, embed.kind) == ("chat", "embed")
    assert think.capabilities.features == ("completion", "tools", "thinking")
    assert (think.capabilities.context_length, think.capabilities.context_source) == (40960, "engine")
    assert (think.details.family, think.details.parameter_size, think.details.quantization_level) == (
        "qwen3",
        "8.2B",
        "Q4_K_M",
    )
    assert think.size == 5_200_000_490
    assert re.fullmatch("sha256:[0-9a-f]{64}", think.digest)
    assert datetime.now(UTC) - think.modified_at < timedelta(hours=1)
    assert think.to_wire()["details"]["context_length"] == 40960
    assert found["audio:latest"].capabilities.features == ("completion", "audio", "transcription")


@asynccontextmanager
async def old_server(shows: Sequence[web.Response]) -> AsyncIterator[tuple[OllamaClient, list[str]]]:
    """A server before 0.6.4, whose list lacks capabilities and context, and the models that it is asked to show.

    Each /api/show is answered by the next of `shows`, the last one repeatedly.
    """
    answers, queried = list(shows), list[str]()

    async def hello(request: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    async def tags(request: web.Request) -> web.Response:
        details = {"family": "llama", "families": None, "parameter_size": "8.0B"}
        encoder = {"family": "nomic-bert", "parameter_size": "137M"}
        return web.json_response(
            {
                "models": [
                    {"name": "some:8b", "digest": "a" * 64, "size": 7, "modified_at": "soon", "details": details},
                    {"model": "encoder:latest", "details": encoder},
                    {"name": None},
                    "what?",
                ]
            }
        )

    async def show(request: web.Request) -> web.Response:
        queried.append((await request.json())["model"])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return web.Response(body=answer.body, status=answer.status, content_type="application/json")

    app = web.Application()
    app.add_routes([web.get("/", hello), web.get("/api/tags", tags), web.post("/api/show", show)])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server = attached_server("http://{}:{}".format(*runner.addresses[0]))
        try:
            client = await server.find()
            assert client is not None
            yield client, queried
        finally:
            await server.detach()
    finally:
        await runner.cleanup()


async def test_old_server_is_queried_once_per_digest() -> None:
    shown = web.json_response(
        {
            "capabilities": ["completion", "vision", "levitation"],
            "model_info": {"general.architecture": "x", "x.context_length": 4711},
        }
    )
    async with old_server([shown]) as (client, queried):
        models = models_with()
        for _ in range(2):
            found = {model.name: model for model in await models.all(client)}
            assert found["some:8b"].capabilities.features == ("completion", "vision")
            assert found["some:8b"].capabilities.context_length == 4711
            assert found["some:8b"].size == 7
        assert sorted(queried) == ["encoder:latest", "some:8b"]


async def test_missing_capabilities_are_estimated_and_queried_again() -> None:
    failing = web.json_response({"error": "oops"}, status=500)
    async with old_server([failing, failing, web.json_response({})]) as (client, queried):
        models = models_with()
        found = {model.name: model for model in await models.all(client)}
        assert (found["some:8b"].kind, found["encoder:latest"].kind) == ("chat", "embed")
        assert found["encoder:latest"].capabilities.features == ("embedding",)
        estimated = found["some:8b"].capabilities.context_length
        assert estimated > 0
        wanted = models_with(context_length=2 * estimated).facts(found["some:8b"], native=False)
        assert wanted.options == {"num_ctx": 2 * estimated}, "an estimate is not a fact"
        await models.all(client)
        assert len(queried) == 4


async def test_configuration_overrides_the_server(shared_client: OllamaClient) -> None:
    models = models_with(
        models=(ModelOverride("think*", 1234, ("tools",)), ModelOverride("tiny-chat", 777)), context_length=9000
    )
    think = await models.get(shared_client, "think:8b")
    assert think.capabilities.features == ("completion", "tools")
    facts = models.facts(think, native=False)
    assert facts.options == {"num_ctx": 1234}
    tiny = models.facts(await models.get(shared_client, "tiny-chat"), native=True)
    assert (tiny.name, tiny.options, tiny.native) == ("tiny-chat:latest", {"num_ctx": 777}, True)
    tools = models.facts(await models.get(shared_client, "tools:7b"), native=False)
    assert tools.options == {"num_ctx": 9000}
    vision = models.facts(await models.get(shared_client, "vision:7b"), native=False)
    assert vision.options == {"num_ctx": 4096}, "at most the model's context length"


async def test_num_ctx_is_left_to_the_server_by_default(shared_client: OllamaClient) -> None:
    models = models_with()
    facts = models.facts(await models.get(shared_client, "think:8b"), native=False)
    assert (facts.options, facts.parameter_size) == ({}, "8.2B")


async def test_model_is_found_by_name_with_or_without_latest(
    shared_client: OllamaClient, shared_server: ContractServer
) -> None:
    models = models_with()
    for name in ("tiny-chat", "tiny-chat:latest", "TINY-chat", "library/tiny-chat"):
        assert (await models.get(shared_client, name)).name == "tiny-chat:latest"
    assert len(shared_server.requests("/api/tags")) == 1, "a call requests no list"


async def test_missing_model_error_has_similar_names_and_pull(shared_client: OllamaClient) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        await models_with().get(shared_client, "tinychat")
    assert caught.value.pull == "tinychat"
    assert "Did you mean tiny-chat:latest?" in str(caught.value)
    assert "PullModel tinychat" in str(caught.value)


async def test_new_model_is_found(attached: OllamaClient, contract_server: ContractServer) -> None:
    models = models_with()
    await models.all(attached)
    await asyncio.sleep(0.11)  # a listing of this moment is not refreshed
    contract_server.add("newcomer:latest")
    assert (await models.get(attached, "newcomer")).name == "newcomer:latest"


@pytest.mark.parametrize("name", ["gpt-oss:120b-cloud", "some-model:cloud"])
async def test_cloud_model_need_not_be_listed(shared_client: OllamaClient, name: str) -> None:
    found = await models_with().get(shared_client, name)
    assert (found.name, found.kind, found.size) == (name, "chat", 0)


# Default model


async def test_default_is_the_newest_model_of_the_kind(
    attached: OllamaClient, contract_server: ContractServer
) -> None:
    models = models_with()
    contract_server.add("young:latest", modified_at="2099-01-02T03:04:05.123456789Z")
    contract_server.add("old:latest", modified_at="2001-01-01T00:00:00Z")
    assert await models.default(attached, "chat") == "young:latest"
    assert await models.default(attached, "generate") == "young:latest"
    assert await models.default(attached, "embed") == "embed:latest"
    assert await models.default(attached, "speech-to-text") == "audio:latest"


async def test_default_prefers_a_loaded_model(attached: OllamaClient) -> None:
    models = models_with()
    await models.load(attached, "vision:7b")
    await models.load(attached, "embed")
    assert await models.default(attached, "chat") == "vision:7b"
    await models.load(attached, "tools:7b")
    assert await models.default(attached, "chat") == "tools:7b", "the most recently used"
    assert await models.default(attached, "embed") == "embed:latest"
    assert await models.default(attached, "speech-to-text") == "audio:latest"


async def test_default_without_models_suggests_a_pull(
    attached: OllamaClient, contract_server: ContractServer
) -> None:
    models = models_with()
    for name in contract_server.names():
        if name != "embed:latest":
            await models.delete(attached, name)
    with pytest.raises(ModelNotFoundError, match=r"for chat.*embed:latest.*PullModel llama3.2:1b"):
        await models.default(attached, "chat")


# Loading and deletion


async def test_load_and_unload(attached: OllamaClient, contract_server: ContractServer) -> None:
    models = models_with(keep_alive="1h")
    assert await models.running(attached) == []
    await models.load(attached, "tools:7b")
    await models.load(attached, "embed")
    [embed, tools] = sorted(await models.running(attached), key=lambda model: model.name)
    assert (embed.name, embed.kind) == ("embed:latest", "embed")
    loaded = tools.loaded
    assert loaded is not None
    assert loaded.memory >= tools.size
    assert loaded.accelerator_memory > 0
    assert loaded.expires_at is not None
    assert timedelta(minutes=50) < loaded.expires_at - datetime.now(UTC) < timedelta(minutes=70)
    assert tools.capabilities.features == ("completion", "insert", "tools")
    assert contract_server.bodies("/api/chat") == [
        {"model": "tools:7b", "stream": False, "keep_alive": "1h", "messages": []}
    ]
    for name in ("tools:7b", "embed"):
        await models.unload(attached, name, 5)
    assert await models.running(attached) == []
    with pytest.raises(ModelNotLoadedError, match="tools:7b is not loaded"):
        await models.unload(attached, "tools:7b", 5)
    with pytest.raises(ModelNotFoundError):
        await models.unload(attached, "nobody", 5)


async def test_model_kept_forever_has_no_expiry(attached: OllamaClient) -> None:
    models = models_with(keep_alive="-1")
    await models.load(attached, "tiny-chat")
    [model] = await models.running(attached)
    assert model.loaded is not None
    assert model.loaded.expires_at is None
    assert "expires_at" not in model.to_wire()["loaded"]


async def test_load_requests_the_same_context_as_calls(
    attached: OllamaClient, contract_server: ContractServer
) -> None:
    models = models_with(context_length=2048, threads=3)
    await models.load(attached, "tiny-chat")
    assert contract_server.bodies("/api/chat")[0]["options"] == {"num_ctx": 2048, "num_thread": 3}
    facts = models.facts(await models.get(attached, "tiny-chat"), native=False)
    assert facts.options == {"num_ctx": 2048, "num_thread": 3}
    [model] = await models.running(attached)
    assert model.loaded is not None
    assert model.loaded.context_length == 2048


async def test_delete(attached: OllamaClient, contract_server: ContractServer) -> None:
    models = models_with()
    await models.delete(attached, "tiny-chat")
    assert "tiny-chat:latest" not in contract_server.names()
    with pytest.raises(ModelNotFoundError):
        await models.get(attached, "tiny-chat")
    with pytest.raises(ModelNotFoundError):
        await models.delete(attached, "tiny-chat")


async def test_deleted_model_is_unloaded_and_not_default(
    attached: OllamaClient, contract_server: ContractServer
) -> None:
    """With Ollama 0.32 a model deleted while it is loaded is still listed as running, and answers 404."""
    models = models_with()
    await models.load(attached, "tiny-chat")
    await models.delete(attached, "tiny-chat")
    assert contract_server.bodies("/api/generate") == [
        {"model": "tiny-chat:latest", "keep_alive": 0, "stream": False}
    ]
    await models.load(attached, "vision:7b")
    await asyncio.to_thread(contract_server.ask, "DELETE", "/api/delete", {"model": "vision:7b"})
    models.invalidate()
    assert await models.default(attached, "chat") != "vision:7b"
