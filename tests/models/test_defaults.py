"""Which model answers a call that names none: the user's choice, plugin.yaml's, the last one pulled, a sample."""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import ModelNotFoundError, PreconditionError
from engine_plugin.manifest import load_manifest
from engine_plugin.models.defaults import DefaultModels
from engine_plugin.plugin import Plugin
from tests.shipped import shipped, write_manifest
from tests.small_engine import SmallEngine

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

HELLO = json.dumps({"messages": [{"role": "user", "content": "a"}]}).encode()


class Engine(SmallEngine):
    """An engine with one sample; `pulled` is its own default."""

    pulled = ""
    asked = 0

    async def is_sample(self, name: str) -> bool:
        return name == "sample"

    async def default_model(self, service: str) -> str:
        return self.pulled

    async def default_models(self, services: Iterable[str]) -> dict[str, str]:
        self.asked += 1
        return await super().default_models(services)

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        if request["model"].startswith("deleted"):
            raise ModelNotFoundError("model: no model is called that", model=request["model"], pull=request["model"])
        return await super().call(service, request)


def plugin_with(tmp_path: Path, default_model: str) -> tuple[Plugin, Engine]:
    """A plugin whose plugin.yaml names that default model for chat."""
    shape = shipped("llamacpp")
    shape["resources"]["data_dir"] = str(tmp_path / "data")
    shape["services"][0]["default_model"] = default_model
    write_manifest(tmp_path, shape)
    manifest = load_manifest(tmp_path / "plugin.yaml")
    engine = Engine(manifest)
    return Plugin(manifest, engine), engine


async def model_of(plugin: Plugin) -> str:
    """The model that answers; GetManifest must name the same one."""
    answered = str(json.loads(await plugin.invoke("chat", HELLO))["model"])
    services = {one["service_name"]: one for one in json.loads(await plugin.manifest_json())["services"]}
    assert services["chat"]["default_model"] == answered
    return answered


@pytest.mark.promise("T3", "T4")
async def test_user_choice_beats_plugin_yaml_and_pulled_model_beats_sample(tmp_path: Path) -> None:
    plugin, engine = plugin_with(tmp_path, "sample")
    assert await model_of(plugin) == "sample"
    engine.pulled = "mine"
    assert await model_of(plugin) == "mine"
    defaults = DefaultModels(plugin.manifest.data_dir, "llamacpp")
    defaults.write({"chat": "chosen", "embed": "other"})
    assert await model_of(plugin) == "chosen"
    defaults.write({"chat": ""})
    assert await model_of(plugin) == "mine"
    plugin, engine = plugin_with(tmp_path, "named-in-plugin-yaml")
    engine.pulled = "mine"
    assert await model_of(plugin) == "named-in-plugin-yaml"


@pytest.mark.promise("T4")
@pytest.mark.parametrize("chosen", [True, False])
async def test_error_for_missing_default_model_names_its_file(tmp_path: Path, chosen: bool) -> None:
    plugin, _engine = plugin_with(tmp_path, "sample" if chosen else "deleted")
    defaults = DefaultModels(plugin.manifest.data_dir, "llamacpp")
    if chosen:
        defaults.write({"chat": "deleted"})
    with pytest.raises(ModelNotFoundError) as told:
        await plugin.invoke("chat", HELLO)
    place = defaults.path if chosen else plugin.manifest.path
    assert told.value.message == (
        f"model: 'deleted', the default model for chat, is not on this machine; {place} names it. "
        "Choose another default, or pull it: PullModel deleted"
    )
    assert told.value.pull == "deleted"
    with pytest.raises(ModelNotFoundError, match="no model is called that"):
        await plugin.invoke("chat", HELLO.replace(b"{", b'{"model": "deleted2", ', 1))


@pytest.mark.parametrize("declared", ["sample", ""])
async def test_error_for_missing_model_that_the_engine_chose_names_no_file(tmp_path: Path, declared: str) -> None:
    plugin, engine = plugin_with(tmp_path, declared)
    engine.pulled = "deleted"
    with pytest.raises(ModelNotFoundError, match=r"^model: no model is called that"):
        await plugin.invoke("chat", HELLO)


async def test_manifest_asks_the_engine_once_for_all_default_models(tmp_path: Path) -> None:
    plugin, engine = plugin_with(tmp_path, "sample")
    engine.pulled = "mine"
    services = json.loads(await plugin.manifest_json())["services"]
    assert {one["default_model"] for one in services if one["service_name"] in engine.services} >= {"mine"}
    assert engine.asked == 1


async def test_change_of_the_file_applies_to_the_next_call(tmp_path: Path) -> None:
    defaults, other = DefaultModels(tmp_path, "x"), DefaultModels(tmp_path, "x")
    for number in range(20):
        other.write({"chat": f"model-{number}"})
        assert await defaults.of("chat") == f"model-{number}"
    other.write({"chat": ""})
    assert await defaults.of("chat") == ""
    assert os.listdir(tmp_path) == ["default-models-x.lock"]  # noqa: PTH208


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_file_of_defaults_is_private(tmp_path: Path) -> None:
    defaults = DefaultModels(tmp_path / "data", "x")
    defaults.write({"chat": "x"})
    assert stat.S_IMODE(defaults.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(defaults.path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"chat": null}', b"\xff"])
async def test_damaged_file_of_defaults_is_named(tmp_path: Path, content: bytes) -> None:
    defaults = DefaultModels(tmp_path, "x")
    defaults.path.write_bytes(content)
    with pytest.raises(PreconditionError, match="is damaged"):
        await defaults.of("chat")
    defaults.path.write_text('{"chat": "mended"}')
    assert await defaults.of("chat") == "mended"
