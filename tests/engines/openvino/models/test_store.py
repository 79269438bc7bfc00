"""The engine's store: its samples, and OpenVINO's rules in a pull."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import engine_plugin
from engine_plugin.download.events import Success
from engine_plugin.engines.openvino.models import inspect_folder, model_store
from engine_plugin.errors import PullError
from engine_plugin.models.info import KINDS, bundled_samples
from engine_plugin.models.layout import digest_of_folder, files_of
from engine_plugin.models.store import FetchPolicy, PullRequest
from tests.models.fakes import pull
from tests.models.hub import REPOSITORY, hub_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from engine_plugin.models.store import ModelStore
    from tests.models.hub import HubServer

SAMPLES = Path(engine_plugin.__file__).parent / "samples" / "openvino"


@pytest.fixture
async def hub() -> AsyncIterator[HubServer]:
    async with hub_server() as hub:
        yield hub


@pytest.fixture
async def store(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ModelStore]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    policy = FetchPolicy(connect_s=5, stall_s=5, attempts=2, backoff_s=0.01, longest_wait_s=1)
    environ = {"HF_ENDPOINT": hub.url(""), "MODELSCOPE_ENDPOINT": hub.url("")}
    store = model_store(tmp_path / "models", "huggingface", environ, policy)
    try:
        yield store
    finally:
        await store.aclose()


def test_each_kind_has_a_sample() -> None:
    samples = bundled_samples("openvino")
    assert [samples.default_for(kind) for kind in KINDS] == [
        "tiny-chat",
        "tiny-embed",
        "tiny-rerank",
        "tiny-image",
        "tiny-transcribe",
        "tiny-speak",
    ]
    assert set(samples.names) == {path.name for path in SAMPLES.iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", bundled_samples("openvino").names)
async def test_each_sample_is_the_folder_that_the_index_describes(name: str) -> None:
    sample = bundled_samples("openvino").get(name)
    assert sample is not None
    assert sum(stat.st_size for _, stat in files_of(sample.path)) == sample.size
    assert await digest_of_folder(sample.path) == sample.digest.removeprefix("sha256:")
    found = inspect_folder(sample.path)
    assert (found.kind, found.details) == (sample.kind, sample.details)


@pytest.mark.parametrize("source", [f"hf:{REPOSITORY}", f"ms:{REPOSITORY}", REPOSITORY])
async def test_repository_on_a_hub_becomes_a_model(store: ModelStore, hub: HubServer, source: str) -> None:
    sample = bundled_samples("openvino").get("tiny-image")
    assert sample is not None
    hub.tree = {path: (sample.path / path).read_bytes() for path, _ in files_of(sample.path)}
    hub.tree |= {"README.md": b"# Model", "model.safetensors": b"x" * 1000, "pipeline.py": b"exit()"}
    events = await pull(store, PullRequest(source))
    assert events[-1] == Success(REPOSITORY, sample.size, sample.digest)
    model = await store.get(REPOSITORY)
    assert (model.kind, model.details) == ("text-to-image", sample.details)
    assert {name for name, _ in hub.fetched} == {path for path, _ in files_of(sample.path)}


async def test_given_kind_overrides_the_detected_one(store: ModelStore) -> None:
    await pull(store, PullRequest("mine", source=str(SAMPLES / "tiny-chat"), model_type="rerank"))
    assert (await store.get("mine")).kind == "rerank"


async def test_repository_without_an_openvino_model_is_rejected_before_the_download(
    store: ModelStore, hub: HubServer
) -> None:
    hub.tree = {"config.json": b"{}", "model.safetensors": b"x" * 1000}
    with pytest.raises(PullError, match=r"hf:Owner/Model-1@main: .*openvino_model\.xml is missing.*safetensors"):
        await pull(store, PullRequest(REPOSITORY))
    assert hub.fetched == []
