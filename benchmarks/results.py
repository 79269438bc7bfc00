"""Samples by row, way and round, and what is made of them: medians, spread, and how the ways compare."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["DIRECT", "PLUGIN", "Results", "Row", "Spread", "quantile"]

DIRECT, PLUGIN = "direct", "plugin"


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that is measured in several ways.

    The second way is compared with each of the others, by `compare`: "added" (the difference; less is better), "cost"
    (the quotient; less is better), "rate" (the quotient; more is better) or "" (not compared).
    """

    group: str
    title: str
    unit: str
    compare: str = ""
    ways: tuple[str, ...] = (DIRECT, PLUGIN)

    @property
    def others(self) -> tuple[str, ...]:
        """The ways that the second one is compared with."""
        return (self.ways[0], *self.ways[2:])


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of all samples, and the values that a tenth of them lie below and above."""

    median: float
    p10: float
    p90: float
    most: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """`values` are at least one."""
        ordered = sorted(values)
        return cls(median(ordered), quantile(ordered, 0.1), quantile(ordered, 0.9), ordered[-1], len(ordered))


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
        self.refusals: dict[tuple[str, str], str] = {}
        """What a way could not do, by row title and way, with the reason."""
        self._samples: dict[Row, dict[str, list[list[float]]]] = defaultdict(dict)

    def begin_round(self) -> None:
        """Samples added from here on belong to the next round."""
        self.rounds += 1

    def add(self, row: Row, target: str, values: Iterable[float]) -> None:
        """Add samples of the current round."""
        rounds = self._samples[row].setdefault(target, [])
        rounds.extend([] for _ in range(self.rounds - len(rounds)))
        rounds[self.rounds - 1].extend(values)

    @property
    def rows(self) -> list[Row]:
        """The rows that have samples, in the order in which they came."""
        return list(self._samples)

    def spread(self, row: Row, target: str) -> Spread | None:
        """All rounds' samples of a row and target together; None when there are none."""
        return _spread([value for values in self._samples[row].get(target, ()) for value in values])

    def compared(self, row: Row, other: str = "") -> Spread | None:
        """How the second way compares with the first, or with another one: what the table shows."""
        if row.compare == "added":
            return _spread([subject - before for before, subject in self._pairs(row, other)])
        return self.quotient(row, other)

    def quotient(self, row: Row, other: str = "") -> Spread | None:
        """The second way divided by the first, or by another one, round by round."""
        return _spread([subject / before for before, subject in self._pairs(row, other) if before])

    def _pairs(self, row: Row, other: str) -> list[tuple[float, float]]:
        """The medians of each round: of the other way, and of the second way."""
        ways = self._samples[row]
        before, subject = ways.get(other or row.ways[0], []), ways.get(row.ways[1], [])
        if not row.compare:
            return []
        return [
            (median(first), median(second))
            for first, second in zip(before, subject, strict=False)
            if first and second
        ]

    def to_json(self) -> list[dict[str, Any]]:
        """One object a row."""
        return [self._row_json(row) for row in self.rows]

    def _row_json(self, row: Row) -> dict[str, Any]:
        return {
            "group": row.group,
            "title": row.title,
            "unit": row.unit,
            "compare": row.compare,
            "ways": {way: _json(self.spread(row, way)) for way in row.ways},
            "compared": {other: _json(self.compared(row, other)) for other in row.others},
            "quotient": {other: _json(self.quotient(row, other)) for other in row.others},
        }


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread.of(values) if values else None


def _json(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else asdict(spread)
