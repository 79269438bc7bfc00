"""Table cells for a model, from its entry in ListModels or GetRunningModels."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["can_do", "context", "idle", "memory", "vram"]

_MINUTE = 60


def context(details: Mapping[str, Any]) -> str:
    """Return the context length in tokens, with ~ for an estimate."""
    length = details.get("context_length") or 0
    return f"{'~' if details.get('context_source') == 'estimate' else ''}{length}" if length else ""


def can_do(entry: Mapping[str, Any]) -> str:
    """Return the capabilities of a model; its kind if they are unknown."""
    details: Mapping[str, Any] = entry.get("details") or {}
    return ", ".join(details.get("capabilities") or [str(entry.get("kind", ""))])


def memory(loaded: Mapping[str, Any]) -> str:
    """Return the memory of a loaded model; empty if it is unknown."""
    size = loaded.get("memory") or 0
    return byte_size(size) if size else ""


def vram(loaded: Mapping[str, Any]) -> str:
    """Return the accelerator memory of a loaded model; empty if its memory is unknown."""
    return byte_size(loaded.get("accelerator_memory") or 0) if loaded.get("memory") else ""


def idle(loaded: Mapping[str, Any]) -> str:
    """Return how long a loaded model has been idle, or how long it stays loaded."""
    if loaded.get("expires_at"):
        try:
            left = (datetime.fromisoformat(loaded["expires_at"]) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return ""
        return f"{_time(left)} left" if left > 0 else "leaving"
    return _time(loaded["idle_s"]) if isinstance(loaded.get("idle_s"), int | float) else ""


def _time(seconds: float) -> str:
    """Format seconds for display."""
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / _MINUTE)
    return f"{minutes} min" if minutes < 2 * _MINUTE else f"{minutes / _MINUTE:.0f} h"
