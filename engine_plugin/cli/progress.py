"""What takes long as it goes: a bar on a terminal, lines elsewhere, JSON for programs."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from engine_plugin.cli.output import human_size, print_json, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import TaskID

    from engine_plugin.host import PullProgress

    Show: TypeAlias = Callable[[PullProgress], None]

__all__ = ["progress_display", "steps_display"]

_LINE_EVERY = 10  # percent


@contextmanager
def progress_display(as_json: bool) -> Iterator[Show]:
    """What is to be called with each step of a pull."""
    if as_json:
        yield print_json
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _Lines().show


@contextmanager
def steps_display(what: str) -> Iterator[Callable[[int, int], None]]:
    """What is to be called with the number of each step done, and of how many (0: unknown)."""
    if not sys.stderr.isatty():
        yield _step_lines(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda step, total: progress.update(bar, completed=step, total=total or None)


def _step_lines(what: str) -> Callable[[int, int], None]:
    """Says each tenth of the steps, and the last."""
    said = 0

    def show(step: int, total: int) -> None:
        nonlocal said
        percent = 100 * step // total if total else 100
        if percent // _LINE_EVERY > said or not total:
            said = percent // _LINE_EVERY
            say(f"{what}: step {step}" + (f" of {total}" if total else ""))

    return show


class _Lines:
    """A line for each new status, and for each tenth of a file."""

    def __init__(self) -> None:
        self._status = ""
        self._tenth: dict[str, int] = {}

    def show(self, step: PullProgress) -> None:
        total, done = step.get("total", 0), step.get("completed", 0)
        digest, status = step.get("digest", ""), step.get("status", "")
        if status not in (self._status, "success"):
            say(status)
        self._status = status
        if total and status != "success":
            percent = 100 * done // total
            if percent // _LINE_EVERY > self._tenth.get(digest, 0):
                self._tenth[digest] = percent // _LINE_EVERY
                say(f"{percent}% of {human_size(total)}")


@contextmanager
def _bars() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars: dict[str, TaskID] = {}

        def show(step: PullProgress) -> None:
            total, status = step.get("total", 0), step.get("status", "")
            digest = step.get("digest", "")
            if status == "success":
                return
            if not total and not step.get("completed"):
                progress.console.print(status, markup=False, highlight=False)
                return
            if digest not in bars:
                bars[digest] = progress.add_task(status, total=None)
            progress.update(bars[digest], completed=step.get("completed", 0), total=total or None)

        yield show
