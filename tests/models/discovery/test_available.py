"""GetManifest names the models that can serve a service where plugin.yaml names none."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import UnavailableError
from engine_plugin.models.available import AvailableModels, names_for
from engine_plugin.models.info import ModelDescription, ModelInfo
from engine_plugin.plugin import Plugin
from tests.small_engine import SmallEngine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from engine_plugin.manifest import Manifest


def model(name: str, kind: str = "chat") -> ModelInfo:
    return ModelInfo(name, kind, 1, "", datetime.now(UTC), bundled=False, details=ModelDescription())


class ListingEngine(SmallEngine):
    """Lists `models` once `gate` is set."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.models: list[ModelInfo] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = 0

    async def list_models(self) -> Sequence[ModelInfo]:
        self.asked += 1
        await self.gate.wait()
        self._step("list_models")
        return self.models


async def told(plugin: Plugin) -> dict[str, list[str]]:
    shape = json.loads(await plugin.manifest_json())
    return {service["service_name"]: service["support_models"] for service in shape["services"]}


@pytest.fixture
def make(manifested: Callable[..., Manifest]) -> Callable[..., tuple[Plugin, ListingEngine]]:
    def make(services: dict[str, dict[str, Any]]) -> tuple[Plugin, ListingEngine]:
        manifest = manifested(services)
        engine = ListingEngine(manifest)
        return Plugin(manifest, engine), engine

    return make


async def test_service_lists_the_models_of_its_kind(make: Callable[..., tuple[Plugin, ListingEngine]]) -> None:
    plugin, engine = make(
        {"chat": {"default_model": "b"}, "embed": {}, "rerank": {"support_models": ["x"]}, "speech-to-text-ws": {}}
    )
    engine.models = [model("a"), model("b"), model("e", "embed"), model("r", "rerank"), model("s", "speech-to-text")]
    assert await told(plugin) == {
        "chat": ["b", "a"],
        "embed": ["e"],
        "rerank": ["x"],
        "speech-to-text-ws": ["s"],
    }
    await plugin.aclose()


async def test_engine_is_not_asked_if_plugin_yaml_lists_all_models(
    make: Callable[..., tuple[Plugin, ListingEngine]],
) -> None:
    plugin, engine = make({"chat": {"support_models": ["x"]}})
    assert await told(plugin) == {"chat": ["x"]}
    assert engine.asked == 0


async def test_failing_engine_keeps_the_previous_lists(
    make: Callable[..., tuple[Plugin, ListingEngine]],
) -> None:
    plugin, engine = make({"chat": {}})
    engine.failing["list_models"] = UnavailableError("no server")
    assert await told(plugin) == {"chat": []}
    engine.failing.clear()
    engine.models = [model("a")]
    assert await told(plugin) == {"chat": ["a"]}
    engine.failing["list_models"] = RuntimeError("a fault of its own")
    assert await told(plugin) == {"chat": ["a"]}
    await plugin.aclose()


async def test_slow_engine_keeps_the_previous_lists(
    make: Callable[..., tuple[Plugin, ListingEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[AvailableModels] = []

    def impatient(ask: Callable[[], Awaitable[Sequence[ModelInfo]]]) -> AvailableModels:
        made.append(AvailableModels(ask, patience=0.05))
        return made[-1]

    monkeypatch.setattr("engine_plugin.plugin.AvailableModels", impatient)
    plugin, engine = make({"chat": {}})
    [available] = made
    engine.models = [model("a")]
    assert await told(plugin) == {"chat": ["a"]}
    engine.models, engine.asked = [model("b")], 0
    engine.gate.clear()
    assert [await told(plugin), await told(plugin)] == [{"chat": ["a"]}] * 2
    assert engine.asked == 1
    engine.gate.set()
    available.patience = 10
    assert await told(plugin) == {"chat": ["b"]}
    await plugin.aclose()


async def test_closing_cancels_the_question() -> None:
    ended = asyncio.Event()

    async def ask() -> Sequence[ModelInfo]:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ()

    offer = AvailableModels(ask, patience=0.01)
    assert await offer.models() == ()
    await offer.aclose()
    assert ended.is_set()
    await AvailableModels(ask).aclose()


def test_default_model_is_first_with_or_without_its_tag() -> None:
    models = [model("a"), model("b:latest"), model("c", "embed")]
    assert names_for("generate", "b", models) == ["b:latest", "a"]
    assert names_for("chat", "absent", models) == ["a", "b:latest"]
    assert names_for("text-to-speech", "", models) == []
