"""Progress of long operations: a bar at a terminal, lines elsewhere, JSON for programs."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, TypeAlias, Unpack

from engine_plugin.cli.output import harmless, human_size, print_json, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import TaskID

    from engine_plugin.host import PluginClient, PullOptions, PullProgress

    Show: TypeAlias = Callable[[PullProgress], None]

__all__ = ["progress_display", "show_pull", "steps_display"]

_TENTHS = 10
_WIDE = 60  # terminal columns from which on bar and speed are shown
_DOWNLOADING = "downloading"
_QUIET = "pulling manifest"  # Ollama repeats it after it has fetched the list of layers


@contextmanager
def progress_display(as_json: bool) -> Iterator[Show]:
    """Yield a callback that displays each step of a pull."""
    if as_json:
        yield print_json
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _Lines().show


@contextmanager
def steps_display(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback that displays finished steps; it takes their number and the total (0: unknown)."""
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
    """Return a callback that prints a line after each tenth of the steps and after the last one."""
    said = 0

    def show(step: int, total: int) -> None:
        nonlocal said
        percent = 100 * step // total if total else 100
        tenth = percent * _TENTHS // 100
        if tenth > said or not total:
            said = tenth
            say(f"{what}: step {step}" + (f" of {total}" if total else ""))

    return show


class _Layers:
    """The sums over the files of a pull, which are reported one by one."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}

    def add(self, step: PullProgress) -> bool:
        """Add a step. Return False if it has no byte counts."""
        completed, total = step.get("completed", 0), step.get("total", 0)
        if not completed and not total:
            return False
        self._known[step.get("digest", "")] = completed, total
        return True

    @property
    def completed(self) -> int:
        """Bytes that have arrived."""
        return sum(completed for completed, _ in self._known.values())

    @property
    def total(self) -> int:
        """Bytes in total; 0 while the size of a file is unknown."""
        totals = [total for _, total in self._known.values()]
        return sum(totals) if all(totals) else 0


def _is_news(status: str, last: str) -> bool:
    """Return whether to print a status: not if it repeats, and not for the end, which has a line of its own."""
    return bool(status) and status not in (last, "success", _QUIET)


class _Lines:
    """Prints a line for each new status and each tenth of the total."""

    def __init__(self) -> None:
        self._layers = _Layers()
        self._status = self._share = ""
        self._total = self._completed = self._tenth = 0

    def show(self, step: PullProgress) -> None:
        status = step.get("status", "")
        if status == "success":
            return
        counted = self._layers.add(step)
        status = _DOWNLOADING if counted else status
        if _is_news(status, self._status):
            say(status)
            self._status = status
        if counted and (total := self._layers.total):
            self._tell(self._layers.completed, total)

    def _tell(self, completed: int, total: int) -> None:
        if total > self._total:  # another file was added: the share falls, and is printed again as it grows
            self._tenth = min(self._tenth, _TENTHS * self._completed // total)
        self._completed, self._total = completed, total
        percent = 100 * completed // total
        share = f"{percent}% of {human_size(total)}"
        if percent * _TENTHS // 100 > self._tenth:
            self._tenth = percent * _TENTHS // 100
            if share != self._share:
                say(share)
                self._share = share


@contextmanager
def _bar() -> Iterator[Show]:
    """Yield a callback that shows one bar for all files of a pull, with other steps as lines above it."""
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

    console = Console(stderr=True)
    wide = console.width >= _WIDE
    columns = (
        TextColumn("{task.description}"),
        *([BarColumn()] if wide else []),
        TaskProgressColumn(),
        DownloadColumn(),
        *([TransferSpeedColumn()] if wide else []),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        layers, last = _Layers(), ""
        bar: TaskID | None = None

        def show(step: PullProgress) -> None:
            nonlocal bar, last
            status = step.get("status", "")
            if status == "success":
                return
            if layers.add(step):
                if bar is None:
                    bar = progress.add_task(_DOWNLOADING, total=None)
                progress.update(bar, completed=layers.completed, total=layers.total or None)
            elif _is_news(status, last):
                progress.console.print(harmless(status), markup=False, highlight=False)
                last = status

        yield show


async def show_pull(
    client: PluginClient, model: str, *, as_json: bool = False, **options: Unpack[PullOptions]
) -> str:
    """Let a plugin pull or copy a model, show the progress, and return the model's name in the store.

    Called by `models pull`, `models copy` and `--auto-pull`. Raises PullError and what else a pull raises.
    """
    pulled = model
    try:
        with progress_display(as_json) as show:
            async with aclosing(client.pull_model_stream(model, **options)) as steps:
                async for step in steps:
                    show(step)
                    pulled = step.get("model") or pulled
    except asyncio.CancelledError:
        say("interrupted; run the same command to resume the pull")
        raise
    return pulled
