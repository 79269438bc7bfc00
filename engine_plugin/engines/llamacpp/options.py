"""The options of the engine llamacpp in plugin.yaml's `engine:` section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine_plugin.engines.local.options import ServerOptions
from engine_plugin.engines.options import number
from engine_plugin.models.capabilities import override_for

if TYPE_CHECKING:
    from engine_plugin.models.info import ModelInfo

__all__ = ["LlamaCppOptions", "served_context"]


@dataclass(frozen=True, slots=True)
class LlamaCppOptions(ServerOptions):
    """Each field is a key below `engine:`. Times are seconds. docs/llamacpp.md documents them.

    `version` is a version of xllamacpp or, for the backend release, the tag of a release of llama.cpp.
    """

    backend: str = field(default="auto", metadata={"choices": ("auto", "xllamacpp", "llama-server", "release")})
    """auto: `llama_server` if set or on PATH, else the installed backend; release: llama.cpp's release archives."""

    llama_server: str = ""
    """The path of a llama-server binary; empty: search PATH."""

    accelerator: str = "auto"
    """The accelerator of a release: cpu, cuda, metal, rocm or vulkan; auto: a detected one."""

    max_loaded_models: int = number(3, 1, 64)
    """How many models stay loaded. Loading one more drains and evicts the least recently used one."""

    parallel: int = number(4, 1, 256)
    """How many requests a model answers at the same time; further ones wait in the queue."""

    context_length: int = number(8192, 128, 10_000_000)
    """The context length in tokens, shared by a model's requests; at most that of the model."""

    gpu_layers: int = number(-1, -1, 1000)
    """How many layers run on a GPU in mode auto and gpu; -1: as many as fit."""


def served_context(model: ModelInfo, options: LlamaCppOptions) -> int:
    """The context length, in tokens, with which a model is loaded: its override in plugin.yaml, else
    `context_length`, limited to that of the model."""
    override = override_for(model.name, options.models)
    if override is not None and override.context_length:
        return override.context_length
    trained = int(model.details.extra.get("context_length") or 0)
    return min(options.context_length, trained) if trained else options.context_length
