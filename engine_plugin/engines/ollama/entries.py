"""What an Ollama server says of its models, read into our types: its list, its `show` and what is in memory."""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from engine_plugin.jsontext import REPLACEMENT
from engine_plugin.models.info import Capabilities, Loaded, ModelDetails, ModelInfo

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["EPOCH", "capabilities_shown", "capabilities_told", "entries_of", "loaded_of", "model_of", "number_of"]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
"""When a model was changed whose server does not say it."""

_FOR_EVER = timedelta(days=365 * 20)
_ENCODERS = ("bert", "nomic-bert")
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_LONGEST = 512
_MOST_FAMILIES = 32
_TOO_MUCH = 1 << 63


def entries_of(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a list of models that have a name."""
    found = answer.get("models")
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    named = [{**entry, "name": _text(entry.get("name")) or _text(entry.get("model"))} for entry in entries]
    return [entry for entry in named if entry["name"]]


def model_of(entry: Mapping[str, Any], told: Capabilities) -> ModelInfo:
    """The model of an entry, of which the server has `told` what it can do; its capabilities are left open."""
    details = _mapping(entry.get("details"))
    family = _text(details.get("family"))
    digest = _DIGEST.fullmatch(_text(entry.get("digest")))
    told_elsewhere = {key: _text(entry.get(key)) for key in ("remote_model", "remote_host")}
    extra: dict[str, Any] = {key: value for key, value in told_elsewhere.items() if value}
    if embedding := number_of(details.get("embedding_length")):
        extra["embedding_length"] = embedding
    return ModelInfo(
        name=entry["name"],
        kind=_kind(told, family),
        size=number_of(entry.get("size")),
        digest=f"sha256:{digest[1]}" if digest else "",
        modified_at=_time(entry.get("modified_at")) or EPOCH,
        bundled=False,
        details=ModelDetails(
            format=_text(details.get("format")),
            family=family,
            families=_texts(details.get("families"))[:_MOST_FAMILIES],
            parameter_size=_text(details.get("parameter_size")),
            quantization_level=_text(details.get("quantization_level")),
            extra=extra,
        ),
    )


def _kind(told: Capabilities, family: str) -> str:
    """What a model is for. Servers of old do not tell; there what only encodes embeds."""
    if told.features:
        return "embed" if "embedding" in told.features and "completion" not in told.features else "chat"
    return "embed" if family.endswith(_ENCODERS) else "chat"


def capabilities_told(entry: Mapping[str, Any]) -> Capabilities:
    """What an entry of the list tells itself."""
    return Capabilities(
        _texts(entry.get("capabilities")), number_of(_mapping(entry.get("details")).get("context_length"))
    )


def capabilities_shown(answer: Mapping[str, Any]) -> Capabilities:
    """What `show` tells."""
    about = _mapping(answer.get("model_info"))
    architecture = _text(about.get("general.architecture"))
    return Capabilities(_texts(answer.get("capabilities")), number_of(about.get(f"{architecture}.context_length")))


def loaded_of(entry: Mapping[str, Any]) -> Loaded:
    """How a model is in memory. The server does not tell when it was used last."""
    expires = _time(entry.get("expires_at"))
    if expires is not None and not EPOCH < expires < datetime.now(UTC) + _FOR_EVER:
        expires = None  # it stays for ever
    return Loaded(
        memory=number_of(entry.get("size")),
        accelerator_memory=number_of(entry.get("size_vram")),
        expires_at=expires,
        context_length=number_of(entry.get("context_length")),
    )


def _text(value: object) -> str:
    """A text; "" for anything else, and for what is too long, or no text that can be shown to anybody."""
    if not isinstance(value, str) or len(value) > _LONGEST or REPLACEMENT in value:
        return ""
    return value if value.isprintable() else ""


def _texts(value: object) -> tuple[str, ...]:
    return tuple(filter(None, map(_text, value))) if isinstance(value, list) else ()


def number_of(value: object) -> int:
    """A count or a length; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _TOO_MUCH else 0


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _time(value: object) -> datetime | None:
    """A time as Go writes it, aware; None for none, and for one that is out of reach."""
    with contextlib.suppress(ValueError, OverflowError):
        found = datetime.fromisoformat(_text(value))
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    return None
