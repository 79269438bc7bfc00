"""Capabilities of llama.cpp's models, from their files and from the servers that have loaded them."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.engines.llamacpp.engine import LlamaCppEngine
from engine_plugin.engines.llamacpp.models import parse_properties
from engine_plugin.models.info import ModelCapabilities
from engine_plugin.models.store import PullRequest
from engine_plugin.plugin import Plugin
from tests.extras import needs

from .conftest import described
from .gguf_files import write_header

needs("xllamacpp")

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
SERVICES: dict[str, dict[str, Any]] = {"chat": {"default_model": "tiny-chat-gguf"}, "embed": {}}


@asynccontextmanager
async def engine(place: Path, **options: Any) -> AsyncIterator[LlamaCppEngine]:
    """Return the engine of a plugin in `place`, not started."""
    chosen = {"name": "llamacpp", "backend": "xllamacpp", "threads": 1, **options}
    found = LlamaCppEngine(described(place, SERVICES, engine=chosen))
    try:
        yield found
    finally:
        await found.aclose()


async def listed(engine: LlamaCppEngine) -> dict[str, ModelCapabilities]:
    return {model.name: model.capabilities for model in await engine.list_models()}


async def test_context_and_features_come_from_the_file(tmp_path: Path) -> None:
    async with engine(tmp_path / "p", context_length=40_000) as llamacpp:
        models = tmp_path / "p/data/models"
        models.mkdir(parents=True)
        write_header(models / "plain.gguf", "llama", 4_096, "{{ messages }}")
        write_header(models / "both.gguf", "qwen3", 32_768, f"{TOOLS}<think>")
        write_header(models / "apart.gguf", "command-r", 131_072, "{{ messages }}", TOOLS)
        write_header(models / "silent.gguf", "qwen3", 32_768, None)
        write_header(models / "embedder.gguf", "bert", 512, None)
        found = await listed(llamacpp)
    assert {name: told for name, told in found.items() if not name.startswith("tiny")} == {
        "plain": ModelCapabilities(("completion",), 4_096, "file"),
        "both": ModelCapabilities(("completion", "tools", "thinking"), 32_768, "file"),
        "apart": ModelCapabilities(("completion", "tools"), 40_000, "configuration"),
        "silent": ModelCapabilities(("completion", "tools", "thinking"), 32_768, "file"),
        "embedder": ModelCapabilities(("embedding",), 512, "file"),
    }


async def test_details_of_samples_equal_those_of_their_files(tmp_path: Path) -> None:
    async with engine(tmp_path / "p") as llamacpp:
        for sample in ("tiny-chat-gguf", "tiny-embed-gguf", "tiny-rerank-gguf"):
            async for _ in llamacpp.pull_model(PullRequest(model=f"my-{sample}", source=f"model:{sample}")):
                pass
        found = await listed(llamacpp)
    for sample in ("tiny-chat-gguf", "tiny-embed-gguf", "tiny-rerank-gguf"):
        assert found[sample] == found[f"my-{sample}"]
    assert found["tiny-chat-gguf"] == ModelCapabilities(("completion", "tools"), 8_192, "file")


async def test_plugin_yaml_overrides_the_file(tmp_path: Path) -> None:
    corrections = [
        {"name": "tiny-ch*", "context_length": 512, "capabilities": ["completion"]},
        {"name": "*", "capabilities": ["vision"]},
    ]
    async with engine(tmp_path / "p", models=corrections) as llamacpp:
        found = await listed(llamacpp)
        await llamacpp.start("cpu")
        await llamacpp.load_model("tiny-chat-gguf")
        [running] = await llamacpp.running_models()
    assert found["tiny-chat-gguf"] == ModelCapabilities(("completion",), 512, "configuration")
    assert found["tiny-embed-gguf"] == ModelCapabilities(("vision", "embedding"), 512, "file")
    assert running.loaded is not None
    assert running.loaded.context_length == 512
    assert running.capabilities == found["tiny-chat-gguf"]


async def test_loaded_model_has_its_memory_and_features(tmp_path: Path) -> None:
    async with engine(tmp_path / "p", context_length=1024) as llamacpp:
        await llamacpp.start("cpu")
        assert await llamacpp.running_models() == []
        await llamacpp.load_model("tiny-chat-gguf")
        await llamacpp.load_model("tiny-embed-gguf")
        running = {model.name: model for model in await llamacpp.running_models()}
        chat, embed = running["tiny-chat-gguf"], running["tiny-embed-gguf"]
        assert chat.loaded is not None
        assert embed.loaded is not None
        assert 10_000_000 < chat.loaded.memory < 2_000_000_000
        assert chat.loaded.idle is not None
        assert 0 <= chat.loaded.idle < 60
        assert (chat.loaded.context_length, embed.loaded.context_length) == (1024, 512)
        assert chat.capabilities == ModelCapabilities(("completion", "tools"), 1024, "engine")
        assert embed.capabilities.features == ("embedding",)
        request: dict[str, Any] = {"model": "tiny-chat-gguf", "messages": [{"role": "user", "content": "count"}]}
        async with llamacpp.stream("chat", request) as chunks:
            await anext(aiter(chunks))
            [busy] = [model for model in await llamacpp.running_models() if model.name == "tiny-chat-gguf"]
            assert busy.loaded is not None
            assert busy.loaded.idle == 0
        await llamacpp.unload_model("tiny-chat-gguf")
        found = await listed(llamacpp)
        assert found["tiny-chat-gguf"] == ModelCapabilities(("completion", "tools"), 1024, "engine")


async def test_manifest_lists_models_that_can_serve(tmp_path: Path) -> None:
    async with engine(tmp_path / "p") as llamacpp:
        plugin = Plugin(llamacpp.manifest, llamacpp)
        shape = json.loads(await plugin.manifest_json())
        await plugin.aclose()
    offered = {service["service_name"]: service["support_models"] for service in shape["services"]}
    assert offered == {"chat": ["tiny-chat-gguf"], "embed": ["tiny-embed-gguf"]}


# What a server says


def told(**shape: Any) -> ModelCapabilities:
    return parse_properties(json.dumps(shape).encode())[0]


def test_server_properties_give_context_length_and_features() -> None:
    length = {"n_ctx": 4096}
    senses = {"vision": True, "audio": False}
    assert told(default_generation_settings=length, modalities=senses, chat_template="<think>") == ModelCapabilities(
        ("completion", "thinking", "vision"), 4096
    )
    assert "tools" in told(chat_template="", chat_template_caps={"supports_tools": True}).features
    assert "tools" not in told(chat_template=TOOLS, chat_template_caps={"supports_tools": False}).features
    assert "tools" in told(chat_template=TOOLS).features


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"not json",
        b'{"default_generation_settings": []}',
        b'{"default_generation_settings": {"n_ctx": true}, "chat_template": 7}',
        b'{"default_generation_settings": {"n_ctx": -1}, "modalities": "all"}',
        b"[" * 100_000,
    ],
)
def test_other_answers_give_no_capabilities(body: bytes) -> None:
    assert parse_properties(body)[0] == ModelCapabilities()
