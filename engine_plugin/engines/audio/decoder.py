"""Decoding audio of any common format in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["AudioLimits"]


def _number(default: Any, low: float, high: float) -> Any:
    return field(default=default, metadata={"min": low, "max": high})


@dataclass(frozen=True, slots=True)
class AudioLimits:
    """How much audio one request may bring; keys of plugin.yaml. Seconds."""

    longest: float = _number(3600.0, 1, 86_400)
    """The longest recording that is transcribed. One hour takes about 115 MB of memory while it is."""

    timeout: float = _number(120.0, 1, 86_400)
    """How long decoding one recording may take."""
