from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import EnginePluginError
from engine_plugin.models.info import KINDS, Samples, bundled_samples
from tests.models.fakes import SAMPLES, digest_of

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
