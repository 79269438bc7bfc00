"""Results as a table in Markdown, which reads well enough in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.results import Results, Row, Spread

__all__ = ["table"]


def table(measured: Sequence[Results], machine: Mapping[str, str]) -> str:
    """The whole report: the machine, then a table for each group."""
    parts = ["\n".join(f"- {name}: {value}" for name, value in machine.items())]
    for results in measured:
        for group in dict.fromkeys(row.group for row in results.rows):
            rows = [row for row in results.rows if row.group == group]
            subject = rows[0].ways[1]
            header = ("", *rows[0].ways, *(f"{subject} to {other}" for other in rows[0].others))
            parts.append(f"### {group}\n\n{_aligned([header, *(_cells(results, row) for row in rows)])}")
        refusals = [f"- {way}, {title}: {why}" for (title, way), why in results.refusals.items()]
        parts += ["Not done:\n\n" + "\n".join(refusals)] if refusals else []
    return "\n\n".join(parts) + "\n"


def _cells(results: Results, row: Row) -> tuple[str, ...]:
    title = f"{row.title}, {row.unit}" if row.unit in ("ms", "s", "MiB", "MB/s", "%") else row.title
    measured = [_spread(results.spread(row, way)) for way in row.ways]
    return title, *measured, *(_comparison(results.compared(row, other), row) for other in row.others)


def _comparison(compared: Spread | None, row: Row) -> str:
    if compared is None:
        return ""
    mark = "×" if row.compare != "added" else "+" if compared.median >= 0 else ""
    return f"{mark}{_spread(compared)}"


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


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell + " " * (width - len(cell)) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
