"""What tables say of a model, from its entry in ListModels and GetRunningModels."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from engine_plugin.cli.output import human_size

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["can_do", "context", "idle", "memory", "vram"]

_MINUTE = 60


def context(details: Mapping[str, Any]) -> str:
    """The tokens that a model takes together, with ~ when they are an estimate."""
    length = details.get("context_length") or 0
    return f"{'~' if details.get('context_source') == 'estimate' else ''}{length}" if length else ""


def can_do(entry: Mapping[str, Any]) -> str:
    """What a model can do; its kind when nobody said more."""
    details: Mapping[str, Any] = entry.get("details") or {}
    return ", ".join(details.get("capabilities") or [str(entry.get("kind", ""))])


def memory(loaded: Mapping[str, Any]) -> str:
    """The memory that a model takes."""
    size = loaded.get("memory") or 0
    return human_size(size) if size else ""


def vram(loaded: Mapping[str, Any]) -> str:
    """The part of it on an accelerator; empty where the memory itself is unknown."""
    return human_size(loaded.get("accelerator_memory") or 0) if loaded.get("memory") else ""


def idle(loaded: Mapping[str, Any]) -> str:
    """How long nobody has used it, or how long it stays."""
    if loaded.get("expires_at"):
        try:
            left = (datetime.fromisoformat(loaded["expires_at"]) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return ""
        return f"{_time(left)} left" if left > 0 else "leaving"
    return _time(loaded["idle_s"]) if isinstance(loaded.get("idle_s"), int | float) else ""


def _time(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / _MINUTE)
    return f"{minutes} min" if minutes < 2 * _MINUTE else f"{minutes / _MINUTE:.0f} h"
