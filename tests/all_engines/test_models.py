"""Models: their details, loading and unloading."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import InvalidRequestError, NotFoundError, PreconditionError, UnsupportedError

if TYPE_CHECKING:
    from .world import World

pytestmark = pytest.mark.asyncio(loop_scope="package")

FEATURES = {"chat": "completion", "embed": "embedding", "rerank": "rerank"}


async def test_model_list_has_the_capabilities_of_each_model(world: World) -> None:
    found = {entry["name"]: entry for entry in await world.plugin.list_models()}
    for kind, name in world.models.items():
        entry = found[name]
        assert entry["model"] == name
        assert datetime.fromisoformat(entry["modified_at"]).tzinfo is not None
        details = entry["details"]
        assert set(details) >= {"format", "family", "families", "parameter_size", "quantization_level"}
        if kind in FEATURES:
            assert FEATURES[kind] in details["capabilities"]


async def test_model_list_has_the_context_length_and_its_source(world: World) -> None:
    [entry] = [entry for entry in await world.plugin.list_models() if entry["name"] == world.model("chat")]
    details = dict(entry["details"])
    assert isinstance(details["context_length"], int)
    assert details["context_length"] > 0
    assert details["context_source"] in ("engine", "file", "family", "estimate")


async def test_manifest_lists_the_models_of_each_service(world: World) -> None:
    manifest = await world.plugin.get_manifest()
    listed = {service["service_name"]: service["support_models"] for service in manifest["services"]}
    for service, models in listed.items():
        if world.can(service):
            assert world.model(service) in models
    assert world.model("embed") not in listed["chat"]


async def test_call_loads_its_model(world: World) -> None:
    await world.plugin.invoke("chat", world.chat(max_tokens=1))
    assert world.model("chat") in {entry["name"] for entry in await world.plugin.running_models()}


async def test_loaded_model_is_listed_until_it_is_unloaded(world: World) -> None:
    if world.engine == "openai":
        pytest.skip("whose models are in memory is the server's business")
    name = world.model("chat")
    await world.plugin.load_model(name)
    [entry] = [entry for entry in await world.plugin.running_models() if entry["name"] == name]
    loaded = dict(entry)["loaded"]
    assert isinstance(loaded, dict)
    assert loaded["memory"] > 0
    await world.plugin.unload_model(name)
    assert name not in {entry["name"] for entry in await world.plugin.running_models()}
    with pytest.raises(PreconditionError, match="not loaded"):
        await world.plugin.unload_model(name)


async def test_missing_model_error_names_the_pull(world: World) -> None:
    with pytest.raises(NotFoundError, match="tiny-cha7") as told:
        await world.plugin.invoke("chat", world.chat() | {"model": "tiny-cha7"})
    assert "tiny-chat" in str(told.value)  # a near name
    with pytest.raises(NotFoundError, match="nobody/has-this"):
        await world.plugin.load_model("nobody/has-this")


async def test_model_of_another_kind_is_rejected(world: World) -> None:
    with pytest.raises(InvalidRequestError, match=r"model: .*embed"):
        await world.plugin.invoke("chat", world.chat() | {"model": world.model("embed")})


async def test_invalid_model_name_is_rejected(world: World) -> None:
    for name in ("../../etc/passwd", "", "a\x00b", "x" * 5000):
        with pytest.raises((InvalidRequestError, NotFoundError, UnsupportedError)):
            await world.plugin.delete_model(name)
