"""Tables and progress bars on terminals of any width, with names in any script."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from .conftest import COMMAND

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are POSIX's", allow_module_level=True)

from .screen import Screen

if TYPE_CHECKING:
    from .conftest import Workplace


def shown(place: Workplace, columns: int, *command: str) -> list[str]:
    """Return the lines that a command leaves on a terminal."""
    env = {name: value for name, value in place.env.items() if name not in ("COLUMNS", "LINES")}
    with Screen([*COMMAND, *command], env, place.plugin, columns) as screen:
        assert screen.end() == 0
        return screen.plain.replace("\r\n", "\n").splitlines()


@pytest.mark.parametrize(
    ("columns", "heads"),
    [
        (120, ["NAME", "KIND", "SIZE", "CONTEXT", "CAPABILITIES", "QUANT", "MODIFIED"]),
        (80, ["NAME", "KIND", "SIZE", "CONTEXT", "CAPABILITIES", "QUANT"]),
        (40, ["NAME", "KIND", "SIZE"]),
        (10, ["NAME", "KIND"]),
    ],
)
def test_narrow_table_drops_columns(managed: Workplace, columns: int, heads: list[str]) -> None:
    lines = shown(managed, columns, "models", "list")
    assert lines[0].split() == heads
    assert len(lines) == 6
    if columns > 10:
        assert max(map(len, lines)) <= columns


def test_table_in_a_pipe_has_all_columns(managed: Workplace) -> None:
    assert managed.good("models", "list", COLUMNS="20").splitlines()[0].split()[-1] == "MODIFIED"


def test_wide_characters_count_as_two_cells(managed: Workplace) -> None:
    (managed.data / "models" / "千问").write_bytes(b"x")
    (managed.data / "models" / "u\u0308ber").write_bytes(b"x")
    lines = managed.good("models", "list").splitlines()
    place = lines[0].index("KIND")
    [wide] = [line for line in lines if line.startswith("千问")]
    [combined] = [line for line in lines if line.startswith("u\u0308")]
    assert wide.index("chat") == place - 2
    assert combined.index("chat") == place + 1


@pytest.mark.parametrize("columns", [40, 80])
def test_progress_bar_fits_one_line(managed: Workplace, columns: int) -> None:
    lines = shown(managed, columns, "models", "pull", "owner/big.bin")
    [bar] = {line.strip() for line in lines if "100%" in line}
    assert "9.8/9.8 KiB" in bar
    assert len(bar) <= columns
    assert ("━" in bar) == (columns == 80)
