"""Tables of models, from their entries in ListModels or GetRunningModels."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from engine_plugin.cli.output import print_table
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from engine_plugin.host import LoadedModel, ModelEntry

__all__ = ["cells_of", "print_models"]

_MINUTE = 60


def print_models(title: str, entries: Iterable[ModelEntry], *heads: str) -> None:
    """Print a table of models: a column of names with this title, and the columns of `cells_of` with these heads."""
    rows = [cells_of(entry) for entry in entries]
    print_table((title, *heads), [[row[head] for head in ("NAME", *heads)] for row in rows])


def cells_of(entry: ModelEntry) -> dict[str, str]:
    """Return the table cells of a model by their heads, "" for what is unknown."""
    details, loaded = entry.get("details") or {}, entry.get("loaded") or {}
    memory = loaded.get("memory") or 0
    return {
        "NAME": entry.get("name", ""),
        "KIND": entry.get("kind", ""),
        "SIZE": byte_size(entry.get("size", 0)),
        "CONTEXT": _context(loaded if "loaded" in entry else details),
        "CAPABILITIES": ", ".join(details.get("capabilities") or [entry.get("kind", "")]),
        "QUANT": details.get("quantization_level", ""),
        "MODIFIED": entry.get("modified_at", "")[:10],
        "MEMORY": byte_size(memory) if memory else "",
        "VRAM": byte_size(loaded.get("accelerator_memory") or 0) if memory else "",
        "IDLE": _idle(loaded),
    }


def _context(shape: Mapping[str, Any]) -> str:
    """Return the context length in tokens, with ~ for an estimate."""
    length = shape.get("context_length") or 0
    return f"{'~' if shape.get('context_source') == 'estimate' else ''}{length}" if length else ""


def _idle(loaded: LoadedModel) -> str:
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
