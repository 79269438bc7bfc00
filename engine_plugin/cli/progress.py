"""Progress of long operations: a bar at a terminal, lines elsewhere, JSON for programs."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, TypeAlias, Unpack

from engine_plugin.cli.output import harmless, print_json, say
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
        yield _lines()


@contextmanager
def steps_display(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback that displays finished steps; it takes their number and the total (0: unknown)."""
    if not sys.stderr.isatty():
        tenths = _Tenths()

        def show(step: int, total: int) -> None:
            if not total or tenths.is_next(step, total):
                say(f"{what}: step {step}" + (f" of {total}" if total else ""))

        yield show
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda step, total: progress.update(bar, completed=step, total=total or None)


class _Tenths:
    """Selects the counts to print: one for each tenth of the total."""

    def __init__(self) -> None:
        self._completed = self._total = self._tenth = 0

    def is_next(self, completed: int, total: int) -> bool:
        """Return whether another tenth is completed."""
        if total > self._total:  # another file was added: the share falls, and is printed again as it grows
            self._tenth = min(self._tenth, _TENTHS * self._completed // total)
        before, self._tenth = self._tenth, max(self._tenth, _TENTHS * completed // total)
        self._completed, self._total = completed, total
        return self._tenth > before


class _Pull:
    """Passes on what is new in the steps of a pull: a status, and the bytes of all its files, reported one by one."""

    def __init__(self, show_status: Callable[[str], None], show_bytes: Callable[[int, int], None]) -> None:
        """`show_bytes` takes the bytes that have arrived and the total, 0 while the size of a file is unknown."""
        self._show_status = show_status
        self._show_bytes = show_bytes
        self._status = ""
        self._files: dict[str, tuple[int, int]] = {}

    def show(self, step: PullProgress) -> None:
        status, completed, total = step.get("status", ""), step.get("completed", 0), step.get("total", 0)
        if status == "success":  # it has a line of its own
            return
        counted = bool(completed or total)
        status = _DOWNLOADING if counted else status
        if status not in ("", _QUIET, self._status):
            self._status = status
            self._show_status(status)
        if counted:
            self._files[step.get("digest", "")] = completed, total
            completions, totals = zip(*self._files.values(), strict=True)
            self._show_bytes(sum(completions), sum(totals) if all(totals) else 0)


def _lines() -> Show:
    """Return a callback that prints a line for each new status and each tenth of the total."""
    tenths = _Tenths()
    last = ""

    def show_bytes(completed: int, total: int) -> None:
        nonlocal last
        if total and tenths.is_next(completed, total):
            share = f"{100 * completed // total}% of {byte_size(total)}"
            if share != last:
                say(share)
            last = share

    return _Pull(say, show_bytes).show


@contextmanager
def _bar() -> Iterator[Show]:
    """Yield a callback that shows one bar for all files of a pull, with other steps as lines above it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class SpeedColumn(ProgressColumn):
        """As rich's TransferSpeedColumn, in the units of all sizes."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{byte_size(int(speed))}/s" if speed is not None else "?")

    console = Console(stderr=True)
    wide = console.width >= _WIDE
    columns = (
        TextColumn("{task.description}"),
        *([BarColumn()] if wide else []),
        TaskProgressColumn(),
        DownloadColumn(binary_units=True),
        *([SpeedColumn()] if wide else []),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(_DOWNLOADING, total=None, visible=False)

        def show_status(status: str) -> None:
            if status != _DOWNLOADING:
                console.print(harmless(status), markup=False, highlight=False)

        yield _Pull(
            show_status,
            lambda completed, total: progress.update(bar, completed=completed, total=total or None, visible=True),
        ).show


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
