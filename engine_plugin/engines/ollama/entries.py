"""Parses what an Ollama server reports of its models:

/api/tags, /api/show and /api/ps. Invalid fields are dropped.
"""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from engine_plugin.models.info import Loaded, ModelCapabilities, ModelDescription, ModelInfo
from engine_plugin.transport.answers import printable_text

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "EPOCH",
    "listed_capabilities",
    "listed_model",
    "loaded_state",
    "named_entries",
    "positive_int",
    "shown_capabilities",
]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
"""The modification time of a model without one."""

_NO_EXPIRY = timedelta(days=365 * 20)
_ENCODERS = ("bert", "nomic-bert")
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_MAX_FAMILIES = 32
_NUMBER_LIMIT = 1 << 63


def named_entries(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a list of models, without those that have no name."""
    found = answer.get("models")
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    named = [
        {**entry, "name": printable_text(entry.get("name")) or printable_text(entry.get("model"))}
        for entry in entries
    ]
    return [entry for entry in named if entry["name"]]


def listed_model(entry: Mapping[str, Any], capabilities: ModelCapabilities) -> ModelInfo:
    """The model of an entry.

    Its kind follows from the server's `capabilities`; the caller resolves the final ones.
    """
    details = _mapping(entry.get("details"))
    family = printable_text(details.get("family"))
    digest = _DIGEST.fullmatch(printable_text(entry.get("digest")))
    remote = {key: printable_text(entry.get(key)) for key in ("remote_model", "remote_host")}
    extra: dict[str, Any] = {key: value for key, value in remote.items() if value}
    if embedding := positive_int(details.get("embedding_length")):
        extra["embedding_length"] = embedding
    return ModelInfo(
        name=entry["name"],
        kind=_kind(capabilities, family),
        size=positive_int(entry.get("size")),
        digest=f"sha256:{digest[1]}" if digest else "",
        modified_at=_time(entry.get("modified_at")) or EPOCH,
        bundled=False,
        details=ModelDescription(
            format=printable_text(details.get("format")),
            family=family,
            families=_texts(details.get("families"))[:_MAX_FAMILIES],
            parameter_size=printable_text(details.get("parameter_size")),
            quantization_level=printable_text(details.get("quantization_level")),
            extra=extra,
        ),
    )


def _kind(capabilities: ModelCapabilities, family: str) -> str:
    """chat or embed. Old servers report no capabilities; there encoder families are for embed."""
    if features := capabilities.features:
        return "embed" if "embedding" in features and "completion" not in features else "chat"
    return "embed" if family.endswith(_ENCODERS) else "chat"


def listed_capabilities(entry: Mapping[str, Any]) -> ModelCapabilities:
    """The capabilities in an entry of /api/tags."""
    return ModelCapabilities(
        _texts(entry.get("capabilities")), positive_int(_mapping(entry.get("details")).get("context_length"))
    )


def shown_capabilities(answer: Mapping[str, Any]) -> ModelCapabilities:
    """The capabilities in an answer of /api/show."""
    about = _mapping(answer.get("model_info"))
    architecture = printable_text(about.get("general.architecture"))
    return ModelCapabilities(
        _texts(answer.get("capabilities")), positive_int(about.get(f"{architecture}.context_length"))
    )


def loaded_state(entry: Mapping[str, Any]) -> Loaded:
    """The memory, expiry and context length in an entry of /api/ps."""
    expires = _time(entry.get("expires_at"))
    if expires is not None and not EPOCH < expires < datetime.now(UTC) + _NO_EXPIRY:
        expires = None  # it never expires
    return Loaded(
        memory=positive_int(entry.get("size")),
        accelerator_memory=positive_int(entry.get("size_vram")),
        expires_at=expires,
        context_length=positive_int(entry.get("context_length")),
    )


def _texts(value: object) -> tuple[str, ...]:
    return tuple(filter(None, map(printable_text, value))) if isinstance(value, list) else ()


def positive_int(value: object) -> int:
    """A positive whole number below 2**63; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _NUMBER_LIMIT else 0


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _time(value: object) -> datetime | None:
    """A time in Go's format, with its zone; None for an invalid one."""
    with contextlib.suppress(ValueError, OverflowError):
        found = datetime.fromisoformat(printable_text(value))
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    return None
