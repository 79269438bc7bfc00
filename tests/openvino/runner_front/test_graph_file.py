"""graph.pbtxt as the model server's own tool writes it, and as people do."""

from __future__ import annotations

from pathlib import Path

import pytest

from openvino_server.graph_file import GraphError, parse_text, read_graph

LLM = """
# OVMS_GRAPH_QUEUE_MAX_SIZE: AUTO
input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"
node: {
  name: "LLMExecutor"
  calculator: "HttpLLMCalculator"
  input_stream: "LOOPBACK:loopback"
  input_side_packet: "LLM_NODE_RESOURCES:llm"
  input_stream_info: { tag_index: 'LOOPBACK:0', back_edge: true }
  node_options: {
    [type.googleapis.com / mediapipe.LLMCalculatorOptions]: {
      models_path: "./",  # beside the graph
      plugin_config: '{"KV_CACHE_PRECISION": "u8"}'
      cache_size: 0x2; enable_prefix_caching: false
      pipeline_type: LM
      cache_eviction_config < start_size: 32 >
      device: "GPU.1"
    }
  }
  input_stream_handler {
    input_stream_handler: "SyncSetInputStreamHandler",
    options { [mediapipe.SyncSetInputStreamHandlerOptions.ext] { sync_set { tag_index: "LOOPBACK:0" } } }
  }
}
"""


def graph(calculator: str, options: str) -> str:
    return (
        f'node {{ calculator: "{calculator}" '
        f"node_options {{ [type.googleapis.com/mediapipe.{calculator}Options] {{ {options} }} }} }}"
    )


def test_the_tools_own_graph() -> None:
    found = read_graph(LLM, Path("/served/m"))
    assert (found.calculator, found.kind, found.device) == ("HttpLLMCalculator", "chat", "GPU.1")
    assert found.models_path == Path("/served/m")
    assert found.options == {
        "plugin_config": '{"KV_CACHE_PRECISION": "u8"}',
        "cache_size": 2,
        "enable_prefix_caching": False,
        "pipeline_type": "LM",
        "cache_eviction_config": {"start_size": 32},
    }


@pytest.mark.parametrize(
    ("calculator", "kind"),
    [
        ("EmbeddingsCalculatorOV", "embed"),
        ("RerankCalculatorOV", "rerank"),
        ("ImageGenCalculator", "text-to-image"),
        ("S2tCalculator", "speech-to-text"),
        ("T2sCalculator", "text-to-speech"),
    ],
)
def test_each_calculator_has_its_kind(calculator: str, kind: str) -> None:
    found = read_graph(graph(calculator, 'models_path: "/m" target_device: "NPU"'), Path("/g"))
    assert (found.kind, found.device, found.models_path, found.options) == (kind, "NPU", Path("/m"), {})


def test_voices_are_always_a_list() -> None:
    one = read_graph(graph("T2sCalculator", 'models_path: "/m" voices { name: "a" path: "b" }'), Path("/"))
    two = read_graph(graph("T2sCalculator", 'models_path: "/m" voices: [{ name: "a" }, { name: "c" }]'), Path("/"))
    assert one.options["voices"] == [{"name": "a", "path": "b"}]
    assert two.options["voices"] == [{"name": "a"}, {"name": "c"}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 'x' \"y\"", "xy"),
        (r"a: 'tab\t\x41\101é\u00e9\'\"\\'", "tab\tAAéé'\"\\"),
        ("a: -1.5e2f", -150.0),
        ("a: 010", 8),
        ("a: -3", -3),
        ("a: -inf", float("-inf")),
        ("a: SUM", "SUM"),
        ("a: TRUE", True),
        ("a: []", None),
    ],
)
def test_values(text: str, value: object) -> None:
    assert parse_text(text).as_dict() == ({} if value is None else {"a": value})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("\n\nnode {", "line 3: the message that begins here has no }"),
        ("a\nb", "line 1: : or { is expected after a"),
        ("a: [1 2]", "line 1: , or ] is expected"),
        ("\na: $", "line 2: cannot be read: '$'"),
        ("a: 'x", "line 1: cannot be read"),
        ("a:", "line 1: a value is expected, not the end"),
        ("[a", "line 1: the name that begins here has no ]"),
        ("}", "line 1: a field's name is expected, not }"),
        ("a {" * 100, "nested too deeply"),
        ("", "exactly one node"),
        (graph("Other", ""), "has Other"),
        (graph("S2tCalculator", ""), "models_path is missing"),
        (graph("S2tCalculator", 'models_path: "/m" plugin_config: "{"'), "plugin_config must be a JSON object"),
        ('node { calculator: "S2tCalculator" }', "has no node_options"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, complaint: str) -> None:
    with pytest.raises(GraphError, match="graph:") as refusal:
        read_graph(text, Path("/"))
    assert complaint in str(refusal.value)
