"""Samples by row, target and round, and what is made of them: medians, spread, and how the plugin compares."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["DIRECT", "PLUGIN", "Results", "Row", "Spread"]

DIRECT, PLUGIN = "direct", "plugin"


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that is measured. `compare`: how the plugin is set against direct: "added", "ratio" or ""."""

    group: str
    title: str
    unit: str
    compare: str = ""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of all samples, and the values that a tenth of them lie below and above."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """`values` are at least one."""
        ordered = sorted(values)
        return cls(median(ordered), _quantile(ordered, 0.1), _quantile(ordered, 0.9), len(ordered))


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Results:
    """What a run has measured. `begin_round` parts the samples, since only those of one round are compared."""

    def __init__(self) -> None:
        self.rounds = 0
        self.others: list[float] = []
        """Percent of the processor that was in use while we did nothing, before each round."""
        self._samples: dict[Row, dict[str, list[list[float]]]] = defaultdict(dict)

    def begin_round(self) -> None:
        """Samples added from here on belong to the next round."""
        self.rounds += 1

    def add(self, row: Row, target: str, values: Iterable[float]) -> None:
        """Add one or more samples of the current round."""
        rounds = self._samples[row].setdefault(target, [])
        rounds.extend([] for _ in range(self.rounds - len(rounds)))
        rounds[self.rounds - 1].extend(values)

    @property
    def rows(self) -> list[Row]:
        """The rows that have samples, in the order in which they came."""
        return list(self._samples)

    def spread(self, row: Row, target: str) -> Spread | None:
        """All rounds' samples of a row and target together; None when there are none."""
        values = [value for values in self._samples[row].get(target, ()) for value in values]
        return Spread.of(values) if values else None

    def compared(self, row: Row) -> Spread | None:
        """Over the rounds: the difference (added) or quotient (ratio) of the round's medians, plugin to direct."""
        targets = self._samples[row]
        if not row.compare or not {DIRECT, PLUGIN} <= targets.keys():
            return None
        pairs = [
            (median(plugin), median(direct))
            for plugin, direct in zip(targets[PLUGIN], targets[DIRECT], strict=False)
            if plugin and direct
        ]
        if row.compare == "added":
            return Spread.of([plugin - direct for plugin, direct in pairs])
        return Spread.of([plugin / direct for plugin, direct in pairs])

    def to_json(self) -> list[dict[str, Any]]:
        """One object a row."""
        return [self._row_json(row) for row in self.rows]

    def _row_json(self, row: Row) -> dict[str, Any]:
        shape: dict[str, Any] = {"group": row.group, "title": row.title, "unit": row.unit}
        for target in (DIRECT, PLUGIN):
            shape[target] = _spread_json(self.spread(row, target))
        shape[row.compare or "compared"] = _spread_json(self.compared(row))
        return shape


def _spread_json(spread: Spread | None) -> dict[str, float] | None:
    if spread is None:
        return None
    return {"median": spread.median, "p10": spread.p10, "p90": spread.p90, "samples": spread.samples}
