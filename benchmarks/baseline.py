"""The committed ratios that `make bench-check` compares a run with.

They are ratios of one run: of the plugin to the engine, to Python alone and to curl. Times and rates depend on the
machine and on the day.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results import PLUGIN
from benchmarks.rounds import FAULTY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["BASELINE", "ratios", "worse"]

BASELINE = Path(__file__).with_name("baseline.json")
_MARGIN = 2.0
_MEMORY_MARGIN = 1.3  # hardly differs from run to run


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What stands in the file, by group and title: the median of the ratio to the row's first way."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        first = next(iter(row["quotient"].values()))
        if first is not None:
            found.setdefault(row["group"], {})[row["title"]] = round(first["median"], 3)
    return found


def worse(rows: Sequence[dict[str, Any]], before: dict[str, dict[str, float]]) -> Iterator[str]:
    """A line for each ratio that is far worse than it was, and for each fault of a stream."""
    yield from _faults(rows)
    now = ratios(rows)
    for row in rows:
        group, title = row["group"], row["title"]
        was, found = before.get(group, {}).get(title), now.get(group, {}).get(title)
        if not was or not found:
            continue
        factor = was / found if row["compare"] == "rate" else found / was
        if factor > (_MEMORY_MARGIN if row["unit"] == "MiB" else _MARGIN):
            yield f"{group}: {title}: ×{found:.2f}, in the baseline ×{was:.2f}: {factor:.1f} times worse"


def _faults(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row["title"] == FAULTY and (most := row["ways"][PLUGIN]["most"]):
            yield f"{row['group']}: up to {most:.1f} % of the plugin's streams lost or reordered lines"
