"""Prints the results of commands: tables for people, JSON for programs."""

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

    from engine_plugin.cli.context import Options

__all__ = [
    "as_json",
    "as_shown",
    "harmless",
    "print_fields",
    "print_json",
    "print_line",
    "print_table",
    "report",
    "say",
]

_GAP = "  "
_FEWEST_COLUMNS = 2

# Left unescaped by json.dumps: C1 controls, characters that change the text direction, and surrogates.
_UNSHOWN = re.compile(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_COMMANDS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")})


def print_json(value: Any) -> None:
    """Print a value as one line of JSON on standard output."""
    click.echo(as_json(value))


def report(options: Options, value: Any, *lines: str) -> None:
    """Print a command's result: with --json the value, else the lines."""
    if options.json:
        print_json(value)
    else:
        for line in lines:
            print_line(line)


def as_json(value: Any) -> str:
    """Return a value as one line of JSON without control characters."""
    return _UNSHOWN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def as_shown(text: str) -> str:
    """Return a text for standard output: without control characters for a terminal, complete for a pipe.

    Unpaired surrogates become question marks.
    """
    text = text.encode(errors="replace").decode()
    return text.translate(_COMMANDS) if sys.stdout.isatty() else text


def say(text: str) -> None:
    """Print lines to standard error, with next steps as commands that can be run here."""
    for line in text.split("\n"):
        click.echo(harmless(advised(line)), err=True)


def print_line(text: str) -> None:
    """Print one line on standard output; it may contain names from foreign servers."""
    click.echo(harmless(text))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns. Cells are never cut; a narrow terminal shows the first columns only."""
    lines = [[harmless(cell) for cell in line] for line in (heads, *rows)]
    widths = [max(_width(line[column]) for line in lines) for column in range(len(heads))]
    shown = _fitting(widths) if sys.stdout.isatty() else len(widths)
    for line in lines:
        cells = (cell + " " * (width - _width(cell)) for cell, width in zip(line[:shown], widths, strict=False))
        click.echo(_GAP.join(cells).rstrip())


def _fitting(widths: Sequence[int]) -> int:
    """Return how many columns fit the terminal's width, at least two."""
    room = shutil.get_terminal_size().columns
    count = len(widths)
    while count > _FEWEST_COLUMNS and sum(widths[:count]) + len(_GAP) * (count - 1) > room:
        count -= 1
    return count


def _width(text: str) -> int:
    """Return the width of a text in terminal cells."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def print_fields(fields: Mapping[str, str], width: int = 9) -> None:
    """Print one line for each field that has a value on standard output; the values begin at column `width`."""
    for name, value in fields.items():
        if value:
            print_line(f"{name + ':':<{width}}{value}")


def harmless(text: str) -> str:
    """Return a text as one line without control characters, because names can come from foreign servers."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
