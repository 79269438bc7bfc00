"""A pulled model can be called by its pull's reference wherever it can be called by its name."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from engine_plugin.download.events import Success
from engine_plugin.engines.ollama.references import Reference, References
from engine_plugin.errors import ModelNotFoundError, PreconditionError
from engine_plugin.models.index import Index
from engine_plugin.models.info import bundled_samples
from engine_plugin.models.layout import FileLayout
from engine_plugin.models.store import ModelStore, PullRequest
from tests.models.fakes import pull
from tests.models.folderworld import folder_world, lay_out
from tests.models.hub import MODEL, REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

    from tests.models.fakes import Inspector
    from tests.models.server import FileServer

pytestmark = pytest.mark.promise("H3")


async def answers(store: ModelStore, reference: str, name: str) -> None:
    """A reference means a model, in every process, until the model is deleted by it."""
    assert (await store.get(reference)).name == name
    [listed] = [model for model in await store.list() if model.name == name]
    assert reference in listed.references
    assert reference in listed.to_wire()["references"]


@pytest.mark.parametrize("form", ["path", "file URL", "URL", "URL with credentials"])
async def test_path_becomes_a_reference(
    store: ModelStore, root: Path, inspector: Inspector, tmp_path: Path, data: bytes, server: FileServer, form: str
) -> None:
    path = tmp_path / "elsewhere" / "mine.gguf"
    path.parent.mkdir()
    path.write_bytes(data)
    url = server.url("/mine.gguf")
    reference = {
        "path": str(path),
        "file URL": path.as_uri(),
        "URL": url,
        "URL with credentials": url.replace("://", "://me:secret@"),
    }[form]
    await pull(store, PullRequest(reference))
    known = url if form == "URL with credentials" else reference
    await answers(store, known, "mine")
    assert (await store.get(reference)).name == "mine"
    assert "secret" not in (root / "mine.json").read_text()
    again = ModelStore(root, inspect=inspector)
    try:
        await answers(again, known, "mine")
        await again.delete(reference)
        for gone in (reference, "mine"):
            with pytest.raises(ModelNotFoundError):
                await again.get(gone)
    finally:
        await again.aclose()


@pytest.mark.parametrize("reference", [f"hf:{REPOSITORY}", f"hf:{REPOSITORY}@v1", f"{REPOSITORY}@v1"])
async def test_repository_becomes_a_reference(root: Path, reference: str) -> None:
    async with folder_world(root) as world:
        await pull(world.store, PullRequest(reference))
        await answers(world.store, reference, REPOSITORY)
        await world.store.delete(reference)
        for gone in (reference, REPOSITORY):
            with pytest.raises(ModelNotFoundError):
                await world.store.get(gone)


@pytest.mark.parametrize(
    ("reference", "pull"),
    [
        (REPOSITORY, REPOSITORY),
        (f"{REPOSITORY}@v1", f"{REPOSITORY}@v1"),
        (f"ms:{REPOSITORY}", f"ms:{REPOSITORY}"),
        ("hf:alone", ""),
        ("hf:../x", ""),
        ("/nowhere/x", ""),
        ("x@v1", ""),
    ],
)
async def test_error_for_unknown_reference_names_its_pull(root: Path, reference: str, pull: str) -> None:
    async with folder_world(root) as world:
        with pytest.raises(ModelNotFoundError) as raised:
            await world.store.get(reference)
        assert raised.value.pull == pull


async def test_folder_becomes_a_reference(root: Path, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "elsewhere" / "mine", MODEL)
    async with folder_world(root) as world:
        await pull(world.store, PullRequest(str(folder)))
        await answers(world.store, str(folder), "mine")
        assert (await pull(world.store, PullRequest("copy", source="model:mine")))[-1].model == "copy"  # type: ignore[union-attr]
        assert (await world.store.get("copy")).references == ()
        await world.store.delete(str(folder))
        assert [model.name for model in await world.store.list()] == ["copy"]


async def test_references_add_up_while_the_source_is_the_same(root: Path) -> None:
    async with folder_world(root) as world:
        for reference in (REPOSITORY, f"hf:{REPOSITORY}", f"hf:{REPOSITORY}@main", f"hf:{REPOSITORY}"):
            await pull(world.store, PullRequest(reference))
        assert set((await world.store.get(REPOSITORY)).references) == {f"hf:{REPOSITORY}", f"hf:{REPOSITORY}@main"}


async def test_model_from_another_source_drops_references(store: ModelStore, tmp_path: Path, data: bytes) -> None:
    """The older file is no longer here: its path must not lead to another model."""
    paths = [tmp_path / name / "mine.gguf" for name in ("old", "new")]
    for path, content in zip(paths, (data, data + b"more"), strict=True):
        path.parent.mkdir()
        path.write_bytes(content)
        await pull(store, PullRequest(str(path)))
    assert (await store.get(str(paths[1]))).size == len(data) + 4
    with pytest.raises(ModelNotFoundError):
        await store.get(str(paths[0]))


async def test_name_takes_precedence_over_reference(
    store: ModelStore, root: Path, tmp_path: Path, data: bytes
) -> None:
    await pull(store, PullRequest("tiny-chat"))
    assert (await store.get("tiny-chat")).name == "tiny-chat-gguf"
    (root / "tiny-chat.gguf").write_bytes(data)
    assert (await store.get("tiny-chat")).name == "tiny-chat"
    await store.delete("tiny-chat")
    assert (await store.get("tiny-chat")).name == "tiny-chat-gguf"


async def test_concurrent_references_are_all_kept(store: ModelStore, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "mine.gguf").write_bytes(data)
    paths = [f"{tmp_path}/{'./' * number}mine.gguf" for number in range(20)]
    await asyncio.gather(*(pull(store, PullRequest(path)) for path in paths))
    assert set((await store.get("mine")).references) == set(paths)


async def test_reference_means_one_model(store: ModelStore, root: Path, inspector: Inspector) -> None:
    for name in ("one", "two"):
        await pull(store, PullRequest(name, source="tiny-chat-gguf"))
    index = Index(FileLayout(root, ".gguf"), inspector)
    for name in ("one", "two"):
        await index.refer(name, "theirs")
    again = ModelStore(root, inspect=inspector)
    assert (await again.get("theirs")).name == "two"
    assert (await again.get("one")).references == ()
    for number in range(100):
        await index.refer("two", str(number))
    last = ModelStore(root, inspect=inspector)
    assert len((await last.get("two")).references) == 64
    assert (await last.get("99")).name == "two"


@pytest.mark.promise("H9")
async def test_former_name_of_a_sample_is_accepted(store: ModelStore) -> None:
    assert (await store.get("tiny-embed")).name == "tiny-embed-gguf"
    assert isinstance((await pull(store, PullRequest("tiny-embed")))[-1], Success)
    await store.delete("tiny-embed")
    assert (await store.get("tiny-embed")).bundled
    with pytest.raises(PreconditionError, match="comes with the plugin's package"):
        await store.delete("tiny-embed")
    assert bundled_samples().names == ["tiny-chat-gguf", "tiny-embed-gguf", "tiny-rerank-gguf"]


async def test_references_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data" / "references.json"
    model, other = Reference("m:latest", "sha256:1"), Reference("n:latest", "sha256:2")
    references = References(path)
    assert await references.get("/x/m.gguf") is None
    assert not path.exists()
    for reference, meant in (("/x/m.gguf", model), ("/y/m.gguf", model), ("/x/n.gguf", other)):
        await references.put(reference, meant)
    assert await References(path).get("/y/m.gguf") == model
    assert await References(path).by_model() == {model: ("/x/m.gguf", "/y/m.gguf"), other: ("/x/n.gguf",)}
    await references.forget("m:latest")
    assert await References(path).by_model() == {other: ("/x/n.gguf",)}


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"name": "m"}}'])
async def test_damaged_file_of_references_is_ignored(tmp_path: Path, content: str) -> None:
    path = tmp_path / "references.json"
    path.write_text(content)
    references = References(path)
    assert await references.by_model() == {}
    await references.put("a", Reference("m", "d"))
    assert json.loads(path.read_text()) == {"a": {"name": "m", "digest": "d"}}
