"""Results as a table in Markdown, which reads well enough in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.results import DIRECT, PLUGIN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.results import Results, Row, Spread

__all__ = ["table"]

_HEADER = ("", DIRECT, PLUGIN, "plugin to direct")


def table(results: Results, machine: Mapping[str, str]) -> str:
    """The whole report: the machine, then a table for each group."""
    parts = ["\n".join(f"- {name}: {value}" for name, value in machine.items())]
    for group in dict.fromkeys(row.group for row in results.rows):
        rows = [_HEADER, *(_cells(results, row) for row in results.rows if row.group == group)]
        parts.append(f"### {group}\n\n{_aligned(rows)}")
    return "\n\n".join(parts) + "\n"


def _cells(results: Results, row: Row) -> tuple[str, str, str, str]:
    title = f"{row.title}, {row.unit}" if row.unit in ("ms", "s", "MiB", "%") else row.title
    direct, plugin, compared = results.spread(row, DIRECT), results.spread(row, PLUGIN), results.compared(row)
    if compared is None:
        return title, _spread(direct), _spread(plugin), ""
    mark = "+" if row.compare == "added" else "×"
    return title, _spread(direct), _spread(plugin), f"{mark}{_spread(compared)}"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    if spread.samples == 1:
        return _number(spread.median)
    return f"{_number(spread.median)} ({_number(spread.p10)}–{_number(spread.p90)})"


def _number(value: float) -> str:
    """Three significant digits, but whole numbers in full."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _aligned(rows: list[tuple[str, str, str, str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [
        "| " + " | ".join(cell + " " * (width - len(cell)) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
