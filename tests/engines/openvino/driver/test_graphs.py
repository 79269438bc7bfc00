"""The options of plugin.yaml in the entries and graphs that a server gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml

from engine_plugin.engines.openvino.graphs import graph_text
from engine_plugin.engines.openvino.options import OpenVinoOptions, device_of, devices_asked, entry_of
from engine_plugin.engines.options import read_options
from engine_plugin.errors import ManifestError
from engine_plugin.manifest import load_manifest
from engine_plugin.models.info import KINDS, ModelDescription, StoredModel
from tests.engines.openvino.fake_ovms.graphs import read_graph


def model(kind: str, folder: str = "/models/of mine/ä") -> StoredModel:
    return StoredModel("owner/mine", kind, 1, "", datetime.now(UTC), False, ModelDescription(), path=Path(folder))


Given: TypeAlias = Callable[..., OpenVinoOptions]


@pytest.fixture
def given(tmp_path: Path) -> Given:
    """Reads options from a plugin.yaml."""

    def read(**engine: Any) -> OpenVinoOptions:
        shape = yaml.safe_load((Path(__file__).parents[4] / "plugin.yaml").read_text())
        shape["engine"] = {"name": "openvino", **engine}
        shape["resources"]["data_dir"] = str(tmp_path)
        (tmp_path / "plugin.yaml").write_text(yaml.safe_dump(shape))
        return read_options(OpenVinoOptions, load_manifest(tmp_path / "plugin.yaml"))

    return read


def both(kind: str, options: OpenVinoOptions, device: str = "CPU", **more: Any) -> dict[str, Any]:
    """What the embedded server's entry says of a model, and the model server's graph as well."""
    entry = entry_of(model(kind), device, options, **more)
    told: dict[str, Any] = json.loads(json.dumps(entry))
    assert {"name": "owner/mine", **read_graph(graph_text(entry))} == told
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_graph(kind: str) -> None:
    told = both(kind, OpenVinoOptions(), "GPU.1")
    assert (told["kind"], told["device"], told["folder"]) == (kind, "GPU.1", "/models/of mine/ä")
    assert set(told["options"]) <= {"enable_prefix_caching", "max_num_seqs"}


def test_path_is_quoted() -> None:
    path = "/with \"quotes\" and \\ and {braces} # and 'more'"
    text = graph_text(entry_of(model("embed", path), "CPU", OpenVinoOptions()))
    assert read_graph(text)["folder"] == path


@pytest.mark.parametrize(
    ("kind", "engine", "expected"),
    [
        ("chat", {"parallel": 7}, {"max_num_seqs": 7, "enable_prefix_caching": True}),
        ("chat", {"parallel": 7, "chat": {"enable_prefix_caching": None, "tool_parser": ""}}, {"max_num_seqs": 7}),
        (
            "chat",
            {
                "chat": {
                    "max_num_seqs": 3,
                    "enable_prefix_caching": False,
                    "cache_size": 2,
                    "plugin_config": '{"KV_CACHE_PRECISION": "u8"}',
                    "pipeline_type": "LM_CB",
                    "tool_parser": "hermes3",
                    "cache_eviction_config": {"aggregation_mode": "SUM", "apply_rotation": True},
                }
            },
            {
                "max_num_seqs": 3,
                "enable_prefix_caching": False,
                "cache_size": 2,
                "plugin_config": '{"KV_CACHE_PRECISION": "u8"}',
                "pipeline_type": "LM_CB",
                "tool_parser": "hermes3",
                "cache_eviction_config": {
                    "start_size": 32,
                    "recent_size": 128,
                    "max_cache_size": 672,
                    "aggregation_mode": "SUM",
                    "apply_rotation": True,
                },
            },
        ),
        (
            "embed",
            {"embed": {"normalize_embeddings": False, "pooling": "MEAN"}},
            {"normalize_embeddings": False, "pooling": "MEAN"},
        ),
        ("rerank", {"rerank": {"max_allowed_chunks": 9}}, {"max_allowed_chunks": 9}),
        (
            "text-to-image",
            {
                "image": {
                    "max_resolution": "64x64",
                    "guidance_scale": 1.5,
                    "lora_adapters": [{"alias": "a", "path": "/a", "alpha": 0.5}, {"alias": "b", "path": "/b"}],
                }
            },
            {
                "max_resolution": "64x64",
                "guidance_scale": 1.5,
                "lora_adapters": [
                    {"alias": "a", "path": "/a", "alpha": 0.5},
                    {"alias": "b", "path": "/b", "alpha": 1.0},
                ],
            },
        ),
        ("speech-to-text", {"transcribe": {"enable_word_timestamps": True}}, {"enable_word_timestamps": True}),
        (
            "text-to-speech",
            {"speak": {"voices": [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}], "speed_max": 2.0}},
            {"voices": [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}], "speed_max": 2.0},
        ),
    ],
)
def test_options_reach_the_graph(given: Given, kind: str, engine: dict[str, Any], expected: dict[str, Any]) -> None:
    assert both(kind, given(**engine))["options"] == expected


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        (
            {"chat": {"cash_size": 1}},
            "engine.chat.cash_size is not an option of this engine. Did you mean 'cache_size'?",
        ),
        ({"chat": {"cache_size": -1}}, "engine.chat.cache_size is -1. It must be at least 0."),
        ({"chat": {"max_num_seqs": "9"}}, "engine.chat.max_num_seqs is '9'. It must be a whole number."),
        ({"chat": {"plugin_config": "[]"}}, "engine.chat.plugin_config is '[]'. It must be a JSON object in a text."),
        ({"chat": {"sparse_attention_config": {"mode": "X"}}}, "It must be one of nothing, TRISHAPE, XATTENTION."),
        ({"image": {"resolution": "64"}}, "It must be a width and a height, such as 512x512."),
        (
            {"image": {"lora_adapters": [{"alias": "a"}]}},
            "lora_adapters[0].path is missing. Give it a text.",
        ),
        ({"speak": {"voices": {"a": "/a"}}}, "It must be a list of mappings."),
        ({"embed": [1]}, "engine.embed is [1]. It must be a mapping."),
    ],
)
def test_invalid_option_of_a_model_is_reported_with_its_line(
    given: Given, engine: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ManifestError, match=r"plugin\.yaml:\d+: error: ") as refusal:
        given(**engine)
    assert complaint in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("", {"INFERENCE_NUM_THREADS": 3}),
        ('{"NUM_STREAMS": "2"}', {"INFERENCE_NUM_THREADS": 3, "NUM_STREAMS": "2"}),
        ('{"INFERENCE_NUM_THREADS": 1}', {"INFERENCE_NUM_THREADS": 1}),
    ],
)
def test_threads_are_passed_in_plugin_config(config: str, expected: dict[str, Any]) -> None:
    options = OpenVinoOptions(embed={"plugin_config": config})
    assert json.loads(both("embed", options, threads=3)["options"]["plugin_config"]) == expected


@pytest.mark.parametrize(
    ("mode", "only_cpu", "options", "expected"),
    [
        ("auto", True, OpenVinoOptions(), "CPU"),
        ("auto", False, OpenVinoOptions(), "AUTO"),
        ("auto", False, OpenVinoOptions(device="GPU.1"), "GPU.1"),
        ("gpu", False, OpenVinoOptions(device="NPU"), "GPU"),
        ("npu", False, OpenVinoOptions(), "NPU"),
        ("gpu", False, OpenVinoOptions(embed={"device": "CPU"}), "CPU"),
        ("cpu", False, OpenVinoOptions(device="GPU", embed={"device": "GPU"}), "CPU"),
    ],
)
def test_device_follows_mode_and_options(mode: str, only_cpu: bool, options: OpenVinoOptions, expected: str) -> None:
    assert device_of("embed", mode, options, only_cpu=only_cpu) == expected


@pytest.mark.parametrize(
    ("mode", "options", "asked"),
    [
        ("auto", OpenVinoOptions(), {}),
        ("npu", OpenVinoOptions(), {"mode": "NPU"}),
        ("auto", OpenVinoOptions(device="GPU.1"), {"engine.device": "GPU.1"}),
        ("auto", OpenVinoOptions(device="HETERO:GPU,CPU"), {}),
        ("auto", OpenVinoOptions(embed={"device": "NPU"}), {"engine.embed.device": "NPU"}),
        ("gpu", OpenVinoOptions(embed={"device": "NPU"}), {"mode": "GPU", "engine.embed.device": "NPU"}),
        ("cpu", OpenVinoOptions(device="GPU", embed={"device": "NPU"}), {"mode": "CPU"}),
    ],
)
def test_requested_devices_are_named_with_their_place(
    mode: str, options: OpenVinoOptions, asked: dict[str, str]
) -> None:
    assert devices_asked(mode, options) == asked
