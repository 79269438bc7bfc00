"""The llama.cpp engine's options in plugin.yaml's `engine:` section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine_plugin.engines.local.options import SoftwareOptions
from engine_plugin.engines.options import number
from engine_plugin.models.capabilities import override_for

if TYPE_CHECKING:
    from engine_plugin.models.info import ModelInfo

__all__ = ["LlamaCppOptions", "served_context"]


@dataclass(frozen=True, slots=True)
class LlamaCppOptions(SoftwareOptions):
    """Each field is a key below `engine:`. Times are seconds; docs/llamacpp.md explains each to a packager.

    `version` is one of xllamacpp, or the tag of a release of llama.cpp, by the backend.
    """

    backend: str = field(default="auto", metadata={"choices": ("auto", "xllamacpp", "llama-server", "release")})
    """auto: `llama_server` when given or found on PATH, else what is installed; release: llama.cpp's own archives."""

    llama_server: str = ""
    """Path of a llama-server binary; empty: look on PATH."""

    accelerator: str = "auto"
    """What a release shall compute on: cpu, cuda, metal, rocm, vulkan; auto takes what is certain to be here."""

    max_loaded_models: int = number(3, 1, 64)
    """How many models stay in memory; loading one more evicts the least recently used, after draining it."""

    parallel: int = number(4, 1, 256)
    """Requests that one model answers at once; further ones wait in our queue."""

    context_length: int = number(8192, 128, 10_000_000)
    """Tokens of context, shared by a model's requests; never more than the model was made for."""

    gpu_layers: int = number(-1, -1, 1000)
    """Layers put on a GPU in mode auto and gpu; -1: as many as fit."""


def served_context(model: ModelInfo, options: LlamaCppOptions) -> int:
    """The tokens of context that a model is loaded with: what plugin.yaml says of this model in particular, else of
    all models, but then no more than it was made for."""
    override = override_for(model.name, options.models)
    if override is not None and override.context_length:
        return override.context_length
    trained = int(model.details.extra.get("context_length") or 0)
    return min(options.context_length, trained) if trained else options.context_length
