"""A model's graph.pbtxt: what the server is to make of a folder, on which device, with which options."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine_plugin.engines.openvino.options import OpenVinoOptions
    from engine_plugin.models.store import StoredModel

__all__ = ["device_of", "devices_asked", "graph_text"]

_DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}


@dataclass(frozen=True, slots=True)
class _Calculator:
    """What serves a kind of model. `options` is the section of plugin.yaml, `loops` whether answers come in parts."""

    name: str
    node: str
    message: str
    resource: str
    options: str
    device: str = "target_device"
    stream: str = "HTTP_"
    loops: bool = False
    contexts: str = ""


_CALCULATORS = {
    "chat": _Calculator(
        "HttpLLMCalculator",
        "LLMExecutor",
        "LLMCalculatorOptions",
        "LLM_NODE_RESOURCES:llm",
        "chat",
        device="device",
        loops=True,
        contexts="LLM_NODE_EXECUTION_CONTEXTS:llm_ctx",
    ),
    "embed": _Calculator(
        "EmbeddingsCalculatorOV",
        "EmbeddingsExecutor",
        "EmbeddingsCalculatorOVOptions",
        "EMBEDDINGS_NODE_RESOURCES:embeddings_servable",
        "embed",
        stream="",
    ),
    "rerank": _Calculator(
        "RerankCalculatorOV",
        "RerankExecutor",
        "RerankCalculatorOVOptions",
        "RERANK_NODE_RESOURCES:rerank_servable",
        "rerank",
        stream="",
    ),
    "text-to-image": _Calculator(
        "ImageGenCalculator",
        "ImageGenExecutor",
        "ImageGenCalculatorOptions",
        "IMAGE_GEN_NODE_RESOURCES:pipes",
        "image",
        device="device",
    ),
    "speech-to-text": _Calculator(
        "S2tCalculator",
        "S2tExecutor",
        "S2tCalculatorOptions",
        "STT_NODE_RESOURCES:s2t_servable",
        "transcribe",
        loops=True,
    ),
    "text-to-speech": _Calculator(
        "T2sCalculator", "T2sExecutor", "T2sCalculatorOptions", "TTS_NODE_RESOURCES:t2s_servable", "speak"
    ),
}

_BACK_EDGE = """\
  input_stream_info: {
    tag_index: 'LOOPBACK:0',
    back_edge: true
  }
"""
_SYNC_SET = """\
  input_stream_handler {
    input_stream_handler: "SyncSetInputStreamHandler",
    options {
      [mediapipe.SyncSetInputStreamHandlerOptions.ext] {
        sync_set {
          tag_index: "LOOPBACK:0"
        }
      }
    }
  }
"""


def device_of(kind: str, mode: str, options: OpenVinoOptions, *, only_cpu: bool) -> str:
    """Where a model of this kind computes when the engine was started in `mode`, in OpenVINO's words.

    What plugin.yaml says of the kind goes before the mode, except that mode cpu means the processor.
    """
    if mode == "cpu":
        return "CPU"
    own: str = getattr(options, _CALCULATORS[kind].options).device
    return own or _DEVICES.get(mode) or options.device or ("CPU" if only_cpu else "AUTO")


def devices_asked(mode: str, options: OpenVinoOptions) -> dict[str, str]:
    """Each device that `mode` and plugin.yaml name outright, by what names it; AUTO, and devices that stand together
    (HETERO:GPU,CPU), are OpenVINO's matter."""
    asked: dict[str, str] = {}
    for kind, calculator in _CALCULATORS.items():
        device = device_of(kind, mode, options, only_cpu=False)
        own = getattr(options, calculator.options).device
        by_kind = own and mode != "cpu"
        where = f"engine.{calculator.options}.device" if by_kind else "mode" if mode in _DEVICES else "engine.device"
        if device != "AUTO" and ":" not in device:
            asked[where] = device
    return asked


def graph_text(model: StoredModel, device: str, options: OpenVinoOptions, *, threads: int = 0) -> str:
    """The text of the graph that serves a model. `threads` is for a server that is not told by another way."""
    calculator = _CALCULATORS[model.kind]
    section = getattr(options, calculator.options)
    if model.kind == "chat" and section.max_num_seqs is None:
        section = dataclasses.replace(section, max_num_seqs=options.parallel)
    if threads:
        section = dataclasses.replace(section, plugin_config=_with_threads(section.plugin_config, threads))
    ways = "REQUEST_PAYLOAD:input", "RESPONSE_PAYLOAD:output"
    into, out = (f'"{calculator.stream}{way}"' for way in ways)
    lines = [f"input_stream: {into}", f"output_stream: {out}", "node: {"]
    lines += [f'  name: "{calculator.node}"', f'  calculator: "{calculator.name}"']
    if calculator.loops:
        lines += ['  input_stream: "LOOPBACK:loopback"', '  output_stream: "LOOPBACK:loopback"']
    lines += [f"  input_stream: {into}", f"  output_stream: {out}"]
    lines += [f'  input_side_packet: "{packet}"' for packet in (calculator.resource, calculator.contexts) if packet]
    lines += ["  node_options: {", f"    [type.googleapis.com / mediapipe.{calculator.message}]: {{"]
    settings = {"models_path": model.path.as_posix(), calculator.device: device}
    lines += [f"      {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()]
    lines += [f"      {line}" for line in _fields(section)]
    lines += ["    }", "  }"]
    loop = _BACK_EDGE + _SYNC_SET if calculator.loops else ""
    return "\n".join(lines) + f"\n{loop}}}\n"


def _with_threads(plugin_config: str, threads: int) -> str:
    """OpenVINO's settings with its number of threads, unless they say it."""
    try:
        return json.dumps({"INFERENCE_NUM_THREADS": threads, **json.loads(plugin_config or "{}")})
    except (ValueError, TypeError):
        return plugin_config  # the server will say what is wrong with it


def _fields(section: Any) -> Iterator[str]:
    """The options that were given, in protobuf's text format; our own `device` is none of them."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.name == "device" or value is None or value == "":
            continue
        for entry in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(entry):
                yield f"{field.name} {{ {' '.join(_fields(entry))} }}"
            else:
                yield f"{field.name}: {entry if 'enum' in field.metadata else _scalar(entry)}"


def _scalar(value: Any) -> str:
    """As JSON, which protobuf's text format reads: true, 4, 0.5, "a text"."""
    return json.dumps(value, ensure_ascii=False)
