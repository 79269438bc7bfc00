"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from typing import TYPE_CHECKING, Any
from unicodedata import combining, east_asian_width

import click

from engine_plugin.cli.context import advised

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "as_json",
    "as_shown",
    "harmless",
    "human_size",
    "print_fields",
    "print_json",
    "print_line",
    "print_table",
    "say",
]

_GAP = "  "
_FEWEST_COLUMNS = 2
_UNITS = ("B", "kB", "MB", "GB", "TB")

# What JSON leaves as it is, and a terminal obeys (C1), shows in another order, or no encoding can write (surrogates).
_UNSHOWN = re.compile(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_COMMANDS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")})


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    click.echo(as_json(value))


def as_json(value: Any) -> str:
    """A value as a line of JSON that a terminal shows as it is."""
    return _UNSHOWN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def as_shown(text: str) -> str:
    """A text of many lines for standard output: a terminal is shown nothing that it would obey, a pipe gets it all.

    What is no character, such as one half of a pair, becomes a mark.
    """
    text = text.encode(errors="replace").decode()
    return text.translate(_COMMANDS) if sys.stdout.isatty() else text


def say(text: str) -> None:
    """Lines for the person at the terminal, on standard error: output stays clean. Commands in them are advised."""
    for line in text.split("\n"):
        click.echo(harmless(advised(line)), err=True)


def print_line(text: str) -> None:
    """One line on standard output, with names that are somebody else's in it."""
    click.echo(harmless(text))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns on standard output. No cell is cut off; a narrow terminal shows the first columns only."""
    lines = [[harmless(cell) for cell in line] for line in (heads, *rows)]
    widths = [max(_width(line[column]) for line in lines) for column in range(len(heads))]
    shown = _fitting(widths) if sys.stdout.isatty() else len(widths)
    for line in lines:
        cells = (cell + " " * (width - _width(cell)) for cell, width in zip(line[:shown], widths, strict=False))
        click.echo(_GAP.join(cells).rstrip())


def _fitting(widths: Sequence[int]) -> int:
    """How many columns fit the terminal's width: two at least, and all when it has no width."""
    room = shutil.get_terminal_size().columns
    count = len(widths)
    while count > _FEWEST_COLUMNS and sum(widths[:count]) + len(_GAP) * (count - 1) > room:
        count -= 1
    return count


def _width(text: str) -> int:
    """The cells of a terminal that a text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def print_fields(fields: Mapping[str, str]) -> None:
    """A line for each field on standard output, their values aligned."""
    width = max((len(name) for name in fields), default=0) + 1
    for name, value in fields.items():
        click.echo(f"{name + ':':<{width}}  {harmless(value)}")


def harmless(text: str) -> str:
    """A text as one line that moves no cursor: names come from servers that are somebody else's."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def human_size(size: float) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    for unit in _UNITS[:-1]:
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} {_UNITS[-1]}"
