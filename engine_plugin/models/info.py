"""What is known about a model, and what an engine finds when it inspects a model file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from pathlib import Path

__all__ = ["KINDS", "Inspection", "ModelDetails", "ModelInfo", "kind_of_type"]

KINDS = ("chat", "embed", "rerank", "text-to-image", "speech-to-text", "text-to-speech")
"""What a model is for. A chat model serves generate too, a speech-to-text model also live transcription."""

_KIND_OF_TYPE = {"": "", "generate": "chat", "speech-to-text-ws": "speech-to-text"} | {kind: kind for kind in KINDS}


def kind_of_type(model_type: str, field: str = "model_type") -> str:
    """The kind for a request's `model_type` (a service's name), "" when none is given.

    Raises InvalidRequestError, beginning with `field`.
    """
    try:
        return _KIND_OF_TYPE[model_type]
    except (KeyError, TypeError):
        known = ", ".join(name for name in _KIND_OF_TYPE if name)
        raise InvalidRequestError(f"{field}: {str(model_type)[:64]!r} is not one of {known}.") from None


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """`details` of a model in ListModels; `extra` holds what else the engine read, as JSON values."""

    format: str = ""
    family: str = ""
    families: tuple[str, ...] = ()
    parameter_size: str = ""
    quantization_level: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        """`details` as JSON; what is in `extra` never hides one of the five fields of the wire."""
        return {
            **self.extra,
            "format": self.format,
            "family": self.family,
            "families": list(self.families),
            "parameter_size": self.parameter_size,
            "quantization_level": self.quantization_level,
        }


@dataclass(frozen=True, slots=True)
class Inspection:
    """What an engine reads from a model file: its kind (one of KINDS) and its details."""

    kind: str
    format: str = ""
    family: str = ""
    families: tuple[str, ...] = ()
    parameter_size: str = ""
    quantization_level: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def details(self) -> ModelDetails:
        """All but the kind."""
        return ModelDetails(
            self.format, self.family, self.families, self.parameter_size, self.quantization_level, self.extra
        )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that is on this machine.

    `digest` is `sha256:…`, or "" for a big file laid into the store by hand while it is still being read.
    `modified_at` is aware, `size` is in bytes; a `bundled` model is a sample inside the package.
    """

    name: str
    path: Path
    kind: str
    size: int
    digest: str
    modified_at: datetime
    bundled: bool
    details: ModelDetails

    def to_wire(self) -> dict[str, Any]:
        """One entry of ListModelsResponse."""
        return {
            "name": self.name,
            "model": self.name,
            "modified_at": self.modified_at.isoformat(),
            "size": self.size,
            "digest": self.digest,
            "details": self.details.to_wire(),
            "kind": self.kind,
            "bundled": self.bundled,
        }
