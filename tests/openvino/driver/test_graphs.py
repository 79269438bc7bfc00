"""A model's graph says to the server what plugin.yaml says to us."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from engine_plugin.engines.openvino.graphs import device_of, devices_asked, graph_text
from engine_plugin.engines.openvino.options import (
    CacheEvictionConfig,
    ChatOptions,
    EmbedOptions,
    ImageOptions,
    LoraAdapter,
    OpenVinoOptions,
    RerankOptions,
    SpeakOptions,
    TranscribeOptions,
    Voice,
)
from engine_plugin.models.info import KINDS, ModelDetails, StoredModel
from openvino_server.graph_file import Graph, read_graph


def model(kind: str, folder: str = "/models/of mine/ä") -> StoredModel:
    return StoredModel("owner/mine", kind, 1, "", datetime.now(UTC), False, ModelDetails(), path=Path(folder))


def read(kind: str, options: OpenVinoOptions, device: str = "CPU", **more: Any) -> Graph:
    return read_graph(graph_text(model(kind), device, options, **more), Path("/elsewhere"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_graph(kind: str) -> None:
    graph = read(kind, OpenVinoOptions(), "GPU.1")
    assert (graph.kind, graph.device, graph.models_path) == (kind, "GPU.1", Path("/models/of mine/ä"))
    assert set(graph.options) <= {"enable_prefix_caching", "max_num_seqs"}


def test_a_path_that_needs_quoting() -> None:
    path = "/with \"quotes\" and \\ and {braces} # and 'more'"
    text = graph_text(model("embed", path), "CPU", OpenVinoOptions())
    assert read_graph(text, Path("/")).models_path == Path(path)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("chat", OpenVinoOptions(parallel=7), {"max_num_seqs": 7, "enable_prefix_caching": True}),
        (
            "chat",
            OpenVinoOptions(
                chat=ChatOptions(
                    max_num_seqs=3,
                    enable_prefix_caching=False,
                    cache_size=2,
                    plugin_config='{"KV_CACHE_PRECISION": "u8"}',
                    pipeline_type="LM_CB",
                    tool_parser="hermes3",
                    cache_eviction_config=CacheEvictionConfig(aggregation_mode="SUM", apply_rotation=True),
                )
            ),
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
            OpenVinoOptions(embed=EmbedOptions(normalize_embeddings=False, pooling="MEAN")),
            {"normalize_embeddings": False, "pooling": "MEAN"},
        ),
        ("rerank", OpenVinoOptions(rerank=RerankOptions(max_allowed_chunks=9)), {"max_allowed_chunks": 9}),
        (
            "text-to-image",
            OpenVinoOptions(
                image=ImageOptions(
                    max_resolution="64x64", guidance_scale=1.5, lora_adapters=(LoraAdapter("a", "/a", 0.5),)
                )
            ),
            {
                "max_resolution": "64x64",
                "guidance_scale": 1.5,
                "lora_adapters": [{"alias": "a", "path": "/a", "alpha": 0.5}],
            },
        ),
        (
            "speech-to-text",
            OpenVinoOptions(transcribe=TranscribeOptions(enable_word_timestamps=True)),
            {"enable_word_timestamps": True},
        ),
        (
            "text-to-speech",
            OpenVinoOptions(speak=SpeakOptions(voices=(Voice("a", "/a"), Voice("b", "/b")), speed_max=2.0)),
            {"voices": [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}], "speed_max": 2.0},
        ),
    ],
)
def test_options(kind: str, options: OpenVinoOptions, expected: dict[str, Any]) -> None:
    assert read(kind, options).options == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", {"INFERENCE_NUM_THREADS": 3}),
        ('{"NUM_STREAMS": "2"}', {"INFERENCE_NUM_THREADS": 3, "NUM_STREAMS": "2"}),
        ('{"INFERENCE_NUM_THREADS": 1}', {"INFERENCE_NUM_THREADS": 1}),
    ],
)
def test_threads_for_a_server_that_is_not_told_otherwise(given: str, expected: dict[str, Any]) -> None:
    options = OpenVinoOptions(embed=EmbedOptions(plugin_config=given))
    assert json.loads(read("embed", options, threads=3).options["plugin_config"]) == expected


@pytest.mark.parametrize(
    ("mode", "only_cpu", "options", "expected"),
    [
        ("auto", True, OpenVinoOptions(), "CPU"),
        ("auto", False, OpenVinoOptions(), "AUTO"),
        ("auto", False, OpenVinoOptions(device="GPU.1"), "GPU.1"),
        ("gpu", False, OpenVinoOptions(device="NPU"), "GPU"),
        ("npu", False, OpenVinoOptions(), "NPU"),
        ("gpu", False, OpenVinoOptions(embed=EmbedOptions(device="CPU")), "CPU"),
        ("cpu", False, OpenVinoOptions(device="GPU", embed=EmbedOptions(device="GPU")), "CPU"),
    ],
)
def test_devices(mode: str, only_cpu: bool, options: OpenVinoOptions, expected: str) -> None:
    assert device_of("embed", mode, options, only_cpu=only_cpu) == expected


@pytest.mark.parametrize(
    ("mode", "options", "asked"),
    [
        ("auto", OpenVinoOptions(), {}),
        ("npu", OpenVinoOptions(), {"mode": "NPU"}),
        ("auto", OpenVinoOptions(device="GPU.1"), {"engine.device": "GPU.1"}),
        ("auto", OpenVinoOptions(device="HETERO:GPU,CPU"), {}),
        ("auto", OpenVinoOptions(embed=EmbedOptions(device="NPU")), {"engine.embed.device": "NPU"}),
        ("gpu", OpenVinoOptions(embed=EmbedOptions(device="NPU")), {"mode": "GPU", "engine.embed.device": "NPU"}),
        ("cpu", OpenVinoOptions(device="GPU", embed=EmbedOptions(device="NPU")), {"mode": "CPU"}),
    ],
)
def test_which_devices_are_asked_for(mode: str, options: OpenVinoOptions, asked: dict[str, str]) -> None:
    assert devices_asked(mode, options) == asked
