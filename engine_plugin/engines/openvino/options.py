"""The OpenVINO engine's options in plugin.yaml's `engine:` section.

The sections `chat` to `speak` hold what a model's graph tells the server, by the names that the OpenVINO Model
Server gives them; what is None is left to the server.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from engine_plugin.engines.local.options import SoftwareOptions
from engine_plugin.engines.options import number
from engine_plugin.speech.decoder import AudioLimits
from engine_plugin.speech.options import LiveOptions

__all__ = [
    "CacheEvictionConfig",
    "ChatOptions",
    "EmbedOptions",
    "ImageOptions",
    "LoraAdapter",
    "OpenVinoOptions",
    "RerankOptions",
    "SparseAttentionConfig",
    "SpeakOptions",
    "TranscribeOptions",
    "Voice",
]


def _count(low: float = 0) -> Any:
    """A number that is left to the server when it is not given."""
    return field(default=None, metadata={"min": low, "max": 10_000_000})


def _word(*choices: str) -> Any:
    """One of the words of an enumeration; empty: left to the server."""
    return field(default="", metadata={"choices": ("", *choices), "enum": True})


def _size() -> Any:
    form = "a width and a height, such as 512x512"
    return field(default="", metadata={"pattern": r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", "form": form})


def _json_object(text: str) -> None:
    """Raises ValueError for anything else."""
    if not isinstance(json.loads(text), dict):
        raise ValueError("no object")


def _json() -> Any:
    return field(default="", metadata={"valid": _json_object, "form": "a JSON object in a text"})


@dataclass(frozen=True, slots=True)
class CacheEvictionConfig:
    """Which tokens leave the cache of a chat model that is full."""

    start_size: int = number(32, 0, 10_000_000)
    recent_size: int = number(128, 0, 10_000_000)
    max_cache_size: int = number(672, 1, 10_000_000)
    aggregation_mode: str = _word("SUM", "NORM_SUM")
    apply_rotation: bool | None = None
    snapkv_window_size: int | None = _count()


@dataclass(frozen=True, slots=True)
class SparseAttentionConfig:
    """Which tokens of a long prompt look at which."""

    mode: str = _word("TRISHAPE", "XATTENTION")
    num_last_dense_tokens_in_prefill: int | None = _count()
    num_retained_start_tokens_in_cache: int | None = _count()
    num_retained_recent_tokens_in_cache: int | None = _count()
    xattention_threshold: float | None = _count()
    xattention_block_size: int | None = _count()
    xattention_stride: int | None = _count()


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """The graph of a chat model (LLMCalculatorOptions)."""

    device: str = ""
    """Where these models compute, in OpenVINO's words (GPU.1, HETERO:GPU,CPU); empty: where the engine does."""

    plugin_config: str = _json()
    """What OpenVINO is told besides, as JSON: {"KV_CACHE_PRECISION": "u8"}."""

    cache_size: int | None = _count()
    """GB of memory for the tokens of running requests; 0: as it is needed."""

    max_num_seqs: int | None = _count(1)
    """Requests that are computed at once; what `parallel` says when it is not given."""

    max_num_batched_tokens: int | None = _count(1)
    dynamic_split_fuse: bool | None = None
    enable_prefix_caching: bool | None = True
    """Whether the beginning that two prompts share is computed once."""

    max_tokens_limit: int | None = _count(1)
    best_of_limit: int | None = _count(1)
    pipeline_type: str = _word("LM", "VLM", "LM_CB", "VLM_CB", "OMNI", "AUTO")
    chat_template_mode: str = _word("MINJA", "JINJA")
    tool_parser: str = ""
    reasoning_parser: str = ""
    enable_tool_guided_generation: bool | None = None
    draft_models_path: str = ""
    """The folder of a small model that guesses ahead."""

    draft_device: str = ""
    draft_cache_size: int | None = _count()
    draft_max_num_seqs: int | None = _count(1)
    draft_max_num_batched_tokens: int | None = _count(1)
    draft_dynamic_split_fuse: bool | None = None
    cache_eviction_config: CacheEvictionConfig | None = None
    sparse_attention_config: SparseAttentionConfig | None = None


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """The graph of an embedding model (EmbeddingsCalculatorOVOptions)."""

    device: str = ""
    plugin_config: str = _json()
    normalize_embeddings: bool | None = None
    pooling: str = _word("CLS", "LAST", "MEAN")
    truncate: bool | None = None
    """Whether a text that is too long is cut instead of refused."""


@dataclass(frozen=True, slots=True)
class RerankOptions:
    """The graph of a reranking model (RerankCalculatorOVOptions)."""

    device: str = ""
    plugin_config: str = _json()
    max_allowed_chunks: int | None = _count(1)
    max_position_embeddings: int | None = _count(1)


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter that is laid over an image model."""

    alias: str
    path: str
    alpha: float = 1.0


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """The graph of a model that makes pictures (ImageGenCalculatorOptions). Sizes are WIDTHxHEIGHT."""

    device: str = ""
    plugin_config: str = _json()
    max_resolution: str = _size()
    default_resolution: str = _size()
    max_num_images_per_prompt: int | None = _count(1)
    default_num_inference_steps: int | None = _count(1)
    max_num_inference_steps: int | None = _count(1)
    resolution: str = _size()
    """The one size that a model for an NPU is compiled for, with the next two."""

    num_images_per_prompt: int | None = _count(1)
    guidance_scale: float | None = _count()
    lora_adapters: tuple[LoraAdapter, ...] = ()


@dataclass(frozen=True, slots=True)
class TranscribeOptions:
    """The graph of a model that hears (S2tCalculatorOptions)."""

    device: str = ""
    plugin_config: str = _json()
    enable_word_timestamps: bool | None = None
    """Whether a request may ask for the time of each word."""


@dataclass(frozen=True, slots=True)
class Voice:
    """A voice by name, and the file of its embedding."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class SpeakOptions:
    """The graph of a model that speaks (T2sCalculatorOptions)."""

    device: str = ""
    plugin_config: str = _json()
    voices: tuple[Voice, ...] = ()
    speed_min: float | None = _count()
    speed_max: float | None = _count()


@dataclass(frozen=True, slots=True)
class OpenVinoOptions(SoftwareOptions):
    """Each field is a key below `engine:`. Times are seconds; docs/openvino.md explains each to a packager.

    `transport` is how our own server is reached; the model server always has a port and a key. `version` is one of
    openvino-genai, or a release of the model server, by the backend.
    """

    backend: str = field(default="auto", metadata={"choices": ("auto", "embedded", "ovms", "release")})
    """auto: `ovms` when given or found on PATH, else what is installed; embedded: our own server; ovms: a model
    server that is here; release: the model server's own archives."""

    ovms: str = ""
    """Path of the OpenVINO Model Server's program; empty: look on PATH."""

    ovms_flavour: str = field(
        default="auto", metadata={"choices": ("auto", "ubuntu22", "ubuntu24", "redhat", "windows")}
    )
    """Which of the model server's archives is installed; auto: the one that fits this system."""

    ovms_python: str = field(default="auto", metadata={"choices": ("auto", "on", "off")})
    """Whether the model server shall have Python in it, for chat templates with tools; auto: where it can run."""

    hub: str = field(default="huggingface", metadata={"choices": ("huggingface", "modelscope")})
    """Where a pull of owner/name looks."""

    device: str = ""
    """Where models compute in mode auto, in OpenVINO's words; empty: AUTO, or CPU where there is nothing else."""

    max_loaded_models: int = number(6, 1, 64)
    """How many models stay in memory; loading one more evicts the least recently used, after draining it."""

    memory_limit: int = number(0, 0, 1_000_000)
    """MB that the loaded models may take together, by the size of their files and by what the server measures;
    0: no limit."""

    parallel: int = number(64, 1, 1024)
    """Requests that one model answers at once; further ones wait in our queue."""

    cache_dir: str = ""
    """Where compiled models are kept, so that a GPU or an NPU need not compile them again; empty:
    <data_dir>/cache."""

    chat: ChatOptions = field(default_factory=ChatOptions)
    embed: EmbedOptions = field(default_factory=EmbedOptions)
    rerank: RerankOptions = field(default_factory=RerankOptions)
    image: ImageOptions = field(default_factory=ImageOptions)
    transcribe: TranscribeOptions = field(default_factory=TranscribeOptions)
    speak: SpeakOptions = field(default_factory=SpeakOptions)
    live: LiveOptions = field(default_factory=LiveOptions)
    """Live transcription: how sound becomes sentences."""

    audio: AudioLimits = field(default_factory=AudioLimits)
    """How much sound one request may bring."""
