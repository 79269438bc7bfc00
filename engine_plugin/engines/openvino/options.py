"""The OpenVINO engine's options in plugin.yaml's `engine:` section, and what a server gets of them for each model.

The sections `chat` to `speak` are the OpenVINO Model Server's graph options under its own names (MODEL_OPTIONS);
they are checked here and passed on. An option without a value is left to the server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping  # noqa: TC003  # read_options evaluates the hints
from dataclasses import MISSING, dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from engine_plugin.engines.local.options import ServerOptions
from engine_plugin.engines.options import Key, Table, number, section
from engine_plugin.speech.options import AudioLimits, LiveOptions

if TYPE_CHECKING:
    from engine_plugin.models.store import StoredModel

__all__ = ["MODEL_OPTIONS", "SECTIONS", "ConfigEntry", "OpenVinoOptions", "device_of", "devices_asked", "entry_of"]

SECTIONS = {
    "chat": "chat",
    "embed": "embed",
    "rerank": "rerank",
    "text-to-image": "image",
    "speech-to-text": "transcribe",
    "text-to-speech": "speak",
}
"""The section for each kind of model."""


def _json_object(text: str) -> None:
    """Raise ValueError for anything else."""
    if not isinstance(json.loads(text), dict):
        raise ValueError("not a JSON object")


def _bounds(low: float) -> Mapping[str, Any]:
    return {"min": low, "max": 10_000_000}


def _word(*choices: str) -> Key:
    """One word of an enumeration; empty: left to the server."""
    return Key(str, "", {"choices": ("", *choices)})


_TEXT = Key(str, "")
_REQUIRED_TEXT = Key(str, MISSING)
_FLAG = Key(bool | None)
_COUNT = Key(int | None, None, _bounds(0))
_LIMIT = Key(int | None, None, _bounds(1))
_NUMBER = Key(float | None, None, _bounds(0))
_SIZE = Key(
    str,
    "",
    {"pattern": r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", "form": "a width and a height, such as 512x512"},
)
_ALL_KINDS: Table = {
    "device": _TEXT,
    "plugin_config": Key(str, "", {"valid": _json_object, "form": "a JSON object in a text"}),
}

_DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}

MODEL_OPTIONS: Mapping[str, Table] = {
    "chat": {
        **_ALL_KINDS,
        "cache_size": _COUNT,
        "max_num_seqs": _LIMIT,
        "max_num_batched_tokens": _LIMIT,
        "dynamic_split_fuse": _FLAG,
        "enable_prefix_caching": Key(bool | None, True),
        "max_tokens_limit": _LIMIT,
        "best_of_limit": _LIMIT,
        "pipeline_type": _word("LM", "VLM", "LM_CB", "VLM_CB", "OMNI", "AUTO"),
        "chat_template_mode": _word("MINJA", "JINJA"),
        "tool_parser": _TEXT,
        "reasoning_parser": _TEXT,
        "enable_tool_guided_generation": _FLAG,
        "draft_models_path": _TEXT,
        "draft_device": _TEXT,
        "draft_cache_size": _COUNT,
        "draft_max_num_seqs": _LIMIT,
        "draft_max_num_batched_tokens": _LIMIT,
        "draft_dynamic_split_fuse": _FLAG,
        "cache_eviction_config": Key(
            {
                "start_size": Key(int, 32, _bounds(0)),
                "recent_size": Key(int, 128, _bounds(0)),
                "max_cache_size": Key(int, 672, _bounds(1)),
                "aggregation_mode": _word("SUM", "NORM_SUM"),
                "apply_rotation": _FLAG,
                "snapkv_window_size": _COUNT,
            }
        ),
        "sparse_attention_config": Key(
            {
                "mode": _word("TRISHAPE", "XATTENTION"),
                "num_last_dense_tokens_in_prefill": _COUNT,
                "num_retained_start_tokens_in_cache": _COUNT,
                "num_retained_recent_tokens_in_cache": _COUNT,
                "xattention_threshold": _NUMBER,
                "xattention_block_size": _COUNT,
                "xattention_stride": _COUNT,
            }
        ),
    },
    "embed": {
        **_ALL_KINDS,
        "normalize_embeddings": _FLAG,
        "pooling": _word("CLS", "LAST", "MEAN"),
        "truncate": _FLAG,
    },
    "rerank": {**_ALL_KINDS, "max_allowed_chunks": _LIMIT, "max_position_embeddings": _LIMIT},
    "image": {
        **_ALL_KINDS,
        "max_resolution": _SIZE,
        "default_resolution": _SIZE,
        "max_num_images_per_prompt": _LIMIT,
        "default_num_inference_steps": _LIMIT,
        "max_num_inference_steps": _LIMIT,
        "resolution": _SIZE,
        "num_images_per_prompt": _LIMIT,
        "guidance_scale": _NUMBER,
        "lora_adapters": Key([{"alias": _REQUIRED_TEXT, "path": _REQUIRED_TEXT, "alpha": Key(float, 1.0)}]),
    },
    "transcribe": {**_ALL_KINDS, "enable_word_timestamps": _FLAG},
    "speak": {
        **_ALL_KINDS,
        "voices": Key([{"name": _REQUIRED_TEXT, "path": _REQUIRED_TEXT}]),
        "speed_min": _NUMBER,
        "speed_max": _NUMBER,
    },
}
"""The options of models by section, named as in the OpenVINO Model Server's calculators (LLMCalculatorOptions,
EmbeddingsCalculatorOVOptions and so on); docs/openvino.md explains each."""


@dataclass(frozen=True, slots=True)
class OpenVinoOptions(ServerOptions):
    """Each field is a key below `engine:`. Times are seconds; docs/openvino.md explains each to a packager.

    `transport` is for the embedded server; OVMS always listens on a port. `version` is one of openvino-genai or a
    release of OVMS, depending on `backend`.
    """

    backend: str = field(default="auto", metadata={"choices": ("auto", "embedded", "ovms", "release")})
    """auto: `ovms` when given or found on PATH, else what is installed; embedded: the embedded server; ovms: an OVMS
    on this machine; release: OVMS from its project's archives."""

    ovms: str = ""
    """Path of the OpenVINO Model Server's program; empty: look on PATH."""

    ovms_flavour: str = field(
        default="auto", metadata={"choices": ("auto", "ubuntu22", "ubuntu24", "redhat", "windows")}
    )
    """Which of OVMS's archives is installed; auto: the one that fits this system."""

    ovms_python: str = field(default="auto", metadata={"choices": ("auto", "on", "off")})
    """Whether to install an OVMS with Python, which chat templates with tools need; auto: if it can run here."""

    hub: str = field(default="huggingface", metadata={"choices": ("huggingface", "modelscope")})
    """The hub of a pull of owner/name."""

    device: str = ""
    """The device for mode auto, by OpenVINO's name; empty: AUTO, or CPU if OpenVINO finds no other device."""

    max_loaded_models: int = number(6, 1, 64)
    """How many models stay in memory; loading one more evicts the least recently used, after draining it."""

    memory_limit: int = number(0, 0, 1_000_000)
    """MB that the loaded models may take together, by the size of their files and by the server's measurement; 0: no
    limit."""

    parallel: int = number(64, 1, 1024)
    """Requests that one model answers at once; further ones wait in the plugin's queue."""

    cache_dir: str = ""
    """Where compiled models are kept, so that a GPU or an NPU need not compile them again; empty:
    <data_dir>/cache."""

    chat: Mapping[str, Any] = section(MODEL_OPTIONS["chat"])
    embed: Mapping[str, Any] = section(MODEL_OPTIONS["embed"])
    rerank: Mapping[str, Any] = section(MODEL_OPTIONS["rerank"])
    image: Mapping[str, Any] = section(MODEL_OPTIONS["image"])
    transcribe: Mapping[str, Any] = section(MODEL_OPTIONS["transcribe"])
    speak: Mapping[str, Any] = section(MODEL_OPTIONS["speak"])
    live: LiveOptions = field(default_factory=LiveOptions)
    """Live transcription: how audio is divided into sentences."""

    audio: AudioLimits = field(default_factory=AudioLimits)
    """The limits on the audio of one request."""

    def of_kind(self, kind: str) -> Mapping[str, Any]:
        """The section for models of a kind."""
        found: Mapping[str, Any] = getattr(self, SECTIONS[kind])
        return found


class ConfigEntry(TypedDict):
    """One model in the embedded server's config.json (docs/openvino-server.md). `options` are of MODEL_OPTIONS."""

    name: str
    kind: str
    folder: str
    device: str
    options: Mapping[str, Any]


def device_of(kind: str, mode: str, options: OpenVinoOptions, *, only_cpu: bool) -> str:
    """The device for models of this kind when the engine was started in `mode`, by OpenVINO's name.

    The section's `device` takes precedence over the mode, except that mode cpu always means CPU. `only_cpu`: OpenVINO
    has found no other device.
    """
    if mode == "cpu":
        return "CPU"
    own: str = options.of_kind(kind).get("device", "")
    return own or _DEVICES.get(mode) or options.device or ("CPU" if only_cpu else "AUTO")


def devices_asked(mode: str, options: OpenVinoOptions) -> dict[str, str]:
    """Each device that `mode` and plugin.yaml name, by the place that names it; without AUTO and combined devices
    (HETERO:GPU,CPU), which OpenVINO resolves."""
    asked: dict[str, str] = {}
    for kind, name in SECTIONS.items():
        device = device_of(kind, mode, options, only_cpu=False)
        by_kind = options.of_kind(kind).get("device") and mode != "cpu"
        where = f"engine.{name}.device" if by_kind else "mode" if mode in _DEVICES else "engine.device"
        if device != "AUTO" and ":" not in device:
            asked[where] = device
    return asked


def entry_of(model: StoredModel, device: str, options: OpenVinoOptions, *, threads: int = 0) -> ConfigEntry:
    """The entry of a model. `threads`: for a server that has no setting for them; `plugin_config` may override it."""
    given = {name: value for name, value in options.of_kind(model.kind).items() if name != "device"}
    if model.kind == "chat":
        given.setdefault("max_num_seqs", options.parallel)
    if threads:
        own = json.loads(given.get("plugin_config") or "{}")
        given["plugin_config"] = json.dumps({"INFERENCE_NUM_THREADS": threads, **own})
    folder = model.path.as_posix()
    return {"name": model.name, "kind": model.kind, "folder": folder, "device": device, "options": given}
