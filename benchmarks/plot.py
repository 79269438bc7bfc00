"""The comparisons as a picture: how many times better the plugin is than each other way."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["plot"]

_LEFT, _WIDTH, _LINE = 450, 560, 20
_MOST = 32.0  # times better or worse; what is beyond stands at the edge
_COLORS = ("#4063d8", "#cb3c33", "#389826", "#9558b2", "#b8860b")
_STYLE = "text{font:12px sans-serif;fill:#333}.head{font-weight:bold}.rule{stroke:#ccc}.one{stroke:#333}"


def plot(rows: Sequence[dict[str, Any]]) -> str:
    """Draw rows as in the JSON, as SVG: a mark at each way's median, a bar from its 10th to its 90th percentile."""
    shown = [row for row in rows if any(row["quotient"].values())]
    colors = _colors(shown)
    groups = list(dict.fromkeys(row["group"] for row in shown))
    height = (len(shown) + 2 * len(groups) + 4) * _LINE
    parts = [*_legend(colors), *_scale(height)]
    at = 3 * _LINE
    for group in groups:
        at += 2 * _LINE
        parts.append(_text(10, at, group, "head"))
        for row in shown:
            if row["group"] == group:
                at += _LINE
                parts += _row(row, at, colors)
    size = f'width="{_LEFT + _WIDTH + 20}" height="{height}"'
    picture = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{_STYLE}</style>\n{picture}\n</svg>\n'


def _colors(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    others = dict.fromkeys(other for row in rows for other, spread in row["quotient"].items() if spread)
    return {other: _COLORS[number % len(_COLORS)] for number, other in enumerate(others)}


def _legend(colors: dict[str, str]) -> Iterator[str]:
    yield _text(10, _LINE, "Times better than …", "head")
    for number, (other, color) in enumerate(colors.items()):
        x = _LEFT + number * 150
        yield f'<circle cx="{x}" cy="{_LINE - 4}" r="4" fill="{color}"/>{_text(x + 8, _LINE, other)}'


def _scale(height: int) -> Iterator[str]:
    for power in range(-5, 6):
        x, style = _place(2.0**power), "rule" if power else "one"
        label = f"{2**power}" if power >= 0 else f"1/{2**-power}"
        yield f'<path d="M{x:.0f},{2.5 * _LINE:.0f}V{height}" class="{style}"/>{_text(x - 8, 2 * _LINE, label)}'


def _row(row: dict[str, Any], at: int, colors: dict[str, str]) -> Iterator[str]:
    yield _text(20, at, f"{row['title']} ({row['unit']})" if row["unit"] else row["title"])
    for other, spread in row["quotient"].items():
        if spread is None:
            continue
        low, middle, high = (_place(_better(row, spread[name])) for name in ("p10", "median", "p90"))
        y, color = at - 4, colors[other]
        yield f'<path d="M{low:.1f},{y}H{high:.1f}" stroke="{color}" stroke-width="2"/>'
        yield f'<circle cx="{middle:.1f}" cy="{y}" r="4" fill="{color}"/>'


def _better(row: dict[str, Any], quotient: float) -> float:
    return quotient if row["compare"] == "rate" else 1 / max(quotient, 1 / _MOST)


def _place(times: float) -> float:
    """Where so many times better stands, on a logarithmic scale."""
    within = min(max(times, 1 / _MOST), _MOST)
    return _LEFT + _WIDTH / 2 * (1 + math.log(within) / math.log(_MOST))


def _text(x: float, y: float, text: str, style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text x="{x:.0f}" y="{y}"{named}>{escape(text)}</text>'
