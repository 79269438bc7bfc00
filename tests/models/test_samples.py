from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import EnginePluginError, PreconditionError
from engine_plugin.models.info import KINDS, Samples, bundled_samples
from engine_plugin.models.store import ModelStore, PullRequest
from tests.models.fakes import SAMPLES, Inspector, digest_of, pull

if TYPE_CHECKING:
    from pathlib import Path


def test_each_sample_is_the_file_that_the_index_describes() -> None:
    samples = bundled_samples()
    paths = set(SAMPLES.glob("*.gguf"))
    for name in samples.names:
        sample = samples.get(name)
        assert sample is not None
        paths.remove(sample.path)
        data = sample.path.read_bytes()
        assert (len(data), digest_of(data)) == (sample.size, sample.digest.removeprefix("sha256:"))
        assert data.startswith(b"GGUF")
    assert paths == set()


@pytest.mark.promise("H9")
def test_no_sample_has_the_name_of_another_engines_sample() -> None:
    """A host that routes calls by the model's name reaches each of them."""
    gguf, openvino = bundled_samples("gguf"), bundled_samples("openvino")
    assert not {name.casefold() for name in gguf.names} & {name.casefold() for name in openvino.names}


@pytest.mark.promise("H9")
@pytest.mark.parametrize("former", ["tiny-chat", "tiny-embed", "tiny-rerank"])
def test_renamed_sample_is_found_by_its_former_name(former: str) -> None:
    sample = bundled_samples("gguf").get(former)
    assert sample is not None
    assert sample.name == f"{former}-gguf"
    assert former not in bundled_samples("gguf").names


def test_each_kind_has_a_sample() -> None:
    samples = bundled_samples()
    served = ("chat", "embed", "rerank")
    assert [samples.default_for(kind) for kind in served] == ["tiny-chat-gguf", "tiny-embed-gguf", "tiny-rerank-gguf"]
    assert not any(samples.default_for(kind) for kind in KINDS if kind not in served)


def test_sample_is_listed_as_a_bundled_model() -> None:
    sample = bundled_samples().get("tiny-embed-gguf")
    assert sample is not None
    wire = sample.to_wire()
    assert json.loads(json.dumps(wire)) == wire
    assert wire["bundled"] is True
    assert wire["kind"] == "embed"
    assert wire["digest"] == sample.digest
    assert wire["details"]["family"] == "bert"
    assert wire["details"]["context_length"] == 512


def test_folder_without_samples_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnginePluginError, match=r"samples\.json"):
        Samples(tmp_path)


@pytest.fixture
def incomplete(tmp_path: Path) -> Samples:
    """Two samples, of which the package has lost the first one's file."""
    entry = {"kind": "chat", "size": 1, "sha256": "0" * 64, "details": {}}
    entries = [entry | {"name": name, "file": name, "aliases": [f"old-{name}"]} for name in ("lost", "kept")]
    (tmp_path / "samples.json").write_text(json.dumps({"samples": entries}))
    (tmp_path / "kept").touch()
    return Samples(tmp_path)


def test_missing_sample_fails_only_its_own_use(incomplete: Samples) -> None:
    assert incomplete.names == ["lost", "kept"]
    assert incomplete.default_for("chat") == "lost"
    assert incomplete.get("absent") is None
    kept = incomplete.get("old-kept")
    assert kept is not None
    assert kept.modified_at.timestamp() == pytest.approx(kept.path.stat().st_mtime)
    for name in ("lost", "old-lost"):
        with pytest.raises(EnginePluginError, match="lost cannot be read: reinstall this package"):
            incomplete.get(name)


async def test_store_with_a_missing_sample_serves_its_other_models(
    root: Path, inspector: Inspector, incomplete: Samples
) -> None:
    store = ModelStore(root, inspect=inspector, samples=incomplete)
    await pull(store, PullRequest("mine", source=str(SAMPLES / "tiny-chat.gguf")))
    assert (await store.get("mine")).name == "mine"
    assert await store.is_sample("old-lost")
    assert await store.defaults_for(["chat"]) == {"chat": "mine"}
    with pytest.raises(PreconditionError, match="comes with the plugin's package"):
        await store.delete("lost")
    with pytest.raises(EnginePluginError, match="reinstall this package"):
        await store.get("lost")
    with pytest.raises(EnginePluginError, match="reinstall this package"):
        await store.list()
    with pytest.raises(EnginePluginError, match="reinstall this package"):
        await pull(store, PullRequest("lost"))
    await pull(store, PullRequest("lost", source=str(SAMPLES / "tiny-embed.gguf")))
    assert [model.name for model in await store.list()] == ["kept", "lost", "mine"]
