"""Capabilities and memory of OpenVINO's models, and one that a call pulls from a hub."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from engine_plugin.engines.openvino.engine import OpenVinoEngine
from engine_plugin.errors import ModelNotFoundError
from engine_plugin.models.info import ModelCapabilities, bundled_samples
from engine_plugin.models.layout import files_of
from engine_plugin.plugin import Plugin
from tests.extras import needs
from tests.models.hub import REPOSITORY, hub_server

from .conftest import described

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

needs("openvino_genai")

SERVICES: dict[str, dict[str, Any]] = {
    name: {}
    for name in ("chat", "embed", "rerank", "text-to-image", "speech-to-text", "speech-to-text-ws", "text-to-speech")
}
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@pytest_asyncio.fixture
async def plugin(scratch: Path) -> AsyncIterator[Plugin]:
    """A plugin that pulls what is missing, from a hub on loopback that has one chat model."""
    async with hub_server() as hub:
        hub.tree = sample_files("tiny-chat")
        hub.storage = hub.url("")
        with pytest.MonkeyPatch.context() as patch:
            for name in PROXIES:
                patch.delenv(name, raising=False)
            patch.setenv("HF_ENDPOINT", hub.url(""))
            options = {"name": "openvino", "backend": "embedded", "threads": 1, "models": [CORRECTION]}
            manifest = described(scratch / "p", SERVICES, auto_pull=True, engine=options)
            plugin = Plugin(manifest, OpenVinoEngine(manifest))
            try:
                yield plugin
            finally:
                await plugin.aclose()


CORRECTION = {"name": "owner/*", "context_length": 2048, "capabilities": ["tools"]}


def sample_files(name: str) -> dict[str, bytes]:
    sample = bundled_samples("openvino").get(name)
    assert sample is not None
    return {path: (sample.path / path).read_bytes() for path, _ in files_of(sample.path)}


async def test_each_model_has_its_features(plugin: Plugin) -> None:
    found = {model.name: model.capabilities for model in await plugin.list_models()}
    assert found["tiny-chat"] == ModelCapabilities(("completion",), 1024, "file")
    assert {name: told.features for name, told in found.items()} == {
        "tiny-chat": ("completion",),
        "tiny-embed": ("embedding",),
        "tiny-rerank": ("rerank",),
        "tiny-image": ("image",),
        "tiny-transcribe": ("transcription",),
        "tiny-speak": ("speech",),
    }
    shape = json.loads(await plugin.manifest_json())
    assert {service["service_name"]: service["support_models"] for service in shape["services"]} == {
        "chat": ["tiny-chat"],
        "embed": ["tiny-embed"],
        "rerank": ["tiny-rerank"],
        "text-to-image": ["tiny-image"],
        "speech-to-text": ["tiny-transcribe"],
        "speech-to-text-ws": ["tiny-transcribe"],
        "text-to-speech": ["tiny-speak"],
    }


async def test_missing_model_is_pulled_and_loaded(plugin: Plugin) -> None:
    await plugin.start("cpu")
    request = {"model": REPOSITORY, "messages": [{"role": "user", "content": "count"}], "max_tokens": 2}
    answer = json.loads(await plugin.invoke("chat", json.dumps(request).encode()))
    assert answer["choices"][0]["message"]["content"]
    [running] = await plugin.running_models()
    assert running.name == REPOSITORY
    assert running.capabilities == ModelCapabilities(("completion", "tools"), 2048, "configuration")
    assert running.loaded is not None
    assert running.loaded.memory > 10_000_000
    assert running.loaded.idle is not None
    assert 0 <= running.loaded.idle < 60

    with pytest.raises(ModelNotFoundError):
        await plugin.invoke("chat", json.dumps({**request, "model": "Owner/Nothing"}).encode())
    assert await plugin.invoke("embed", b'{"model": "tiny-embed", "input": "a"}')
    running_now = {model.name: model.loaded for model in await plugin.running_models()}
    assert all(loaded is not None and loaded.memory > 10_000_000 for loaded in running_now.values())
    assert running_now.keys() == {REPOSITORY, "tiny-embed"}
