"""Tests for every Ollama: the contract server, and the server at OLLAMA_TEST_HOST."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.base import HealthState
from engine_plugin.errors import ModelNotFoundError
from engine_plugin.models.request import PullRequest
from tests.models.fakes import pulled

from .engine import HELLO, answer, plugin_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from engine_plugin.plugin import Plugin
    from tests.engines.ollama.conftest import Ollama


@pytest.fixture
async def plugin(any_ollama: Ollama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plugin]:
    monkeypatch.setenv("OLLAMA_HOST", any_ollama.url)
    async with plugin_in(tmp_path) as found:
        yield found


async def test_engine_attaches(plugin: Plugin, any_ollama: Ollama) -> None:
    assert (await plugin.health()).state is HealthState.READY
    assert await plugin.version()
    listed = {model.name: model for model in await plugin.list_models()}
    model = listed[any_ollama.model]
    assert model.kind == "chat"
    assert model.size > 0
    assert len(model.digest) == len("sha256:") + 64
    assert "completion" in model.capabilities.features
    assert model.capabilities.context_length >= 512
    assert model.capabilities.context_source == "engine"


async def test_model_is_loaded_and_unloaded(plugin: Plugin, any_ollama: Ollama) -> None:
    await plugin.load_model(any_ollama.model)
    running = {model.name: model.loaded for model in await plugin.running_models()}
    loaded = running[any_ollama.model]
    assert loaded is not None
    assert loaded.memory > 0
    assert (await answer(plugin, "chat", messages=HELLO, max_tokens=2))["choices"], "a loaded model is the default"
    await plugin.unload_model(any_ollama.model)
    assert any_ollama.model not in {model.name for model in await plugin.running_models()}


async def test_copy_is_created_and_deleted(plugin: Plugin, any_ollama: Ollama) -> None:
    name = "engine-plugin-test-copy:latest"
    events = await pulled(plugin, PullRequest(name, source=f"model:{any_ollama.model}"))
    try:
        assert events
        listed = {model.name: model for model in await plugin.list_models()}
        assert listed[name].digest == listed[any_ollama.model].digest
        completion = await answer(plugin, "chat", model=name.removesuffix(":latest"), messages=HELLO, max_tokens=2)
        assert completion["choices"]
    finally:
        await plugin.delete_model(name)
    assert name not in {model.name for model in await plugin.list_models()}


async def test_missing_model_is_reported(plugin: Plugin) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        await answer(plugin, "chat", model="nobody-has-this-model:0b", messages=HELLO)
    assert caught.value.pull == "nobody-has-this-model:0b"
