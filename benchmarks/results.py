"""Samples by row, way and round, and what is made of them: medians, spread, and how the ways compare."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["DIRECT", "PLUGIN", "Results", "Row", "Spread", "quantile"]

DIRECT, PLUGIN = "direct", "plugin"


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that is measured. `compare`: how the second way is set against the first: "added", "ratio" or ""."""

    group: str
    title: str
    unit: str
    compare: str = ""
    ways: tuple[str, str] = (DIRECT, PLUGIN)


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
        return cls(median(ordered), quantile(ordered, 0.1), quantile(ordered, 0.9), len(ordered))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of the samples lie below; `ordered` are sorted and at least one."""
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
        """Over the rounds: the difference (added) or quotient (ratio) of the round's medians, second to first way."""
        targets = self._samples[row]
        if not row.compare or not set(row.ways) <= targets.keys():
            return None
        before, after = (targets[way] for way in row.ways)
        pairs = [
            (median(first), median(second)) for first, second in zip(before, after, strict=False) if first and second
        ]
        if row.compare == "added":
            return Spread.of([second - first for first, second in pairs])
        return Spread.of([second / first for first, second in pairs])

    def to_json(self) -> list[dict[str, Any]]:
        """One object a row."""
        return [self._row_json(row) for row in self.rows]

    def _row_json(self, row: Row) -> dict[str, Any]:
        shape: dict[str, Any] = {"group": row.group, "title": row.title, "unit": row.unit}
        for target in row.ways:
            shape[target] = _spread_json(self.spread(row, target))
        shape[row.compare or "compared"] = _spread_json(self.compared(row))
        return shape


def _spread_json(spread: Spread | None) -> dict[str, float] | None:
    if spread is None:
        return None
    return {"median": spread.median, "p10": spread.p10, "p90": spread.p90, "samples": spread.samples}
