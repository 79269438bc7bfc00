"""`source: model:OLD` copies a model of the store."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from engine_plugin.download.events import Success
from engine_plugin.engines.openvino.models import choose_files, inspect_folder
from engine_plugin.errors import InvalidRequestError, ModelNotFoundError, PullError
from engine_plugin.models.info import Inspection, ModelDescription, bundled_samples
from engine_plugin.models.layout import files_of
from engine_plugin.models.store import ModelStore, PullRequest
from engine_plugin.system.files import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture(params=["file", "folder"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ModelStore]:
    """A store of each form, with a chat model `old` that the configuration declares an embedder."""

    async def look_at_file(path: Path) -> Inspection:
        return Inspection("chat", ModelDescription(extra={"suffix": path.suffix}))

    async def look_at_folder(path: Path) -> Inspection:
        return await in_thread(inspect_folder, path)

    made: ModelStore = (
        ModelStore(tmp_path / "m", inspect=look_at_file, samples=bundled_samples())
        if request.param == "file"
        else ModelStore(
            tmp_path / "m",
            inspect=look_at_folder,
            choose=choose_files,
            samples=bundled_samples("openvino"),
            environ={},
        )
    )
    try:
        await pull(made, model="old", source="tiny-chat", model_type="embed")
        yield made
    finally:
        await made.aclose()


async def pull(store: ModelStore, **request: Any) -> Success:
    events = [event async for event in store.pull(PullRequest(**request))]
    assert isinstance(events[-1], Success)
    return events[-1]


def inodes(path: Path) -> list[int]:
    files = [path / name for name, _ in files_of(path)] if path.is_dir() else [path]
    return [file.stat().st_ino for file in files]


async def test_copy_is_a_hard_link_with_the_same_details(store: ModelStore) -> None:
    done = await pull(store, model="new", source="model:old")
    old, new = await store.get("old"), await store.get("new")
    assert (new.kind, new.size, new.digest, new.details) == ("embed", old.size, old.digest, old.details)
    assert (done.model, done.digest) == ("new", old.digest)
    assert inodes(new.path) == inodes(old.path)
    await store.delete("old")
    assert [model.name for model in await store.list() if not model.bundled] == ["new"]
    assert inodes(new.path)
    assert (await pull(store, model="again", source="model:new", model_type="chat")).digest == old.digest
    assert (await store.get("again")).kind == "chat"


async def test_copy_without_hard_links_copies_the_bytes(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    await pull(store, model="new", source="model:old")
    old, new = await store.get("old"), await store.get("new")
    assert (new.kind, new.digest) == ("embed", old.digest)
    assert not set(inodes(new.path)) & set(inodes(old.path))
    await store.delete("new")
    assert list((store.root / ".partial").glob("new*")) == [store.root / ".partial" / "new.lock"]


async def test_repeated_copy_changes_nothing(store: ModelStore) -> None:
    await pull(store, model="new", source="model:old")
    before = inodes((await store.get("new")).path)
    await pull(store, model="new", source="model:old")
    await pull(store, model="old", source="model:old")
    assert inodes((await store.get("new")).path) == before


async def test_copy_replaces_another_model(store: ModelStore) -> None:
    await pull(store, model="new", source="tiny-embed")
    await pull(store, model="new", source="model:old")
    assert (await store.get("new")).digest == (await store.get("old")).digest


async def test_sample_model_can_be_copied(store: ModelStore) -> None:
    await pull(store, model="mine", source="model:tiny-embed")
    mine, sample = await store.get("mine"), await store.get("tiny-embed")
    assert (mine.kind, mine.digest, mine.bundled) == ("embed", sample.digest, False)
    assert not set(inodes(mine.path)) & set(inodes(sample.path))


@pytest.mark.parametrize(("source", "near"), [("model:olt", "Did you mean old?"), ("model:../x", "Here are: old,")])
async def test_copy_of_a_missing_model_fails(store: ModelStore, source: str, near: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"^source: .*no model is called") as raised:
        await pull(store, model="new", source=source)
    assert near in str(raised.value)
    assert raised.value.pull == ""


@pytest.mark.parametrize("name", ["", "../x", "a b", "OLD"])
async def test_copy_needs_a_valid_name(store: ModelStore, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^model: "):
        await pull(store, model=name, source="model:old")


async def test_copy_verifies_the_requested_digest(store: ModelStore) -> None:
    with pytest.raises(InvalidRequestError, match="sha256"):
        await pull(store, model="new", source="model:old", sha256="0" * 64)


async def test_model_that_changes_during_the_copy_is_rejected(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = (await store.get("old")).path
    file = path / "config.json" if path.is_dir() else path
    link = os.link

    def touched(source: str, target: Path) -> None:
        link(source, target)
        os.utime(file, (1, 1)) if not path.is_dir() else file.write_bytes(file.read_bytes() + b"\n")

    monkeypatch.setattr(os, "link", touched)
    with pytest.raises(PullError, match="changed during the copy"):
        await pull(store, model="new", source="model:old")
    assert list((store.root / ".partial").glob("new*")) == [store.root / ".partial" / "new.lock"]


# What is missing, and how it would be had


async def test_error_for_missing_model_of_a_hub_names_its_pull(store: ModelStore) -> None:
    with pytest.raises(ModelNotFoundError) as raised:
        await store.get("OpenVINO/olt")
    folders = (await store.get("old")).path.is_dir()
    assert raised.value.pull == ("OpenVINO/olt" if folders else "")
    assert ("PullModel OpenVINO/olt" in str(raised.value)) == folders
    with pytest.raises(ModelNotFoundError, match="Did you mean old") as raised:
        await store.get("olt")
    assert raised.value.pull == ""
