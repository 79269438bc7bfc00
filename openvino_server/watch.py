"""Noticing that a worker hangs: it owes something, and for long it neither says anything nor uses its processor.

A worker is judged from outside: by what comes through its pipes, and by the processor time that the system has
counted for it. It is not asked to send signs of life, for they would say less. A step of a language model keeps
Python's lock for seconds, so no thread of the worker could send one while it works hardest; and one that did arrive
would not say whether the pipeline is stuck. Nothing of this is done per token: what comes sets a flag, and the system
is asked only after an interval in which nothing came.

A worker that uses its processor is let be, unless it goes on with what was cancelled and says nothing meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

import psutil

__all__ = ["INTERVAL", "Watch", "Watched"]

INTERVAL = 5.0
"""Seconds between two looks, at most."""

ABANDONED = 30.0
"""Seconds in which a worker says that a cancelled call has ended, or anything else: a step, a batch of texts."""

_LOOKS = 8  # within the time after which it hangs, at least
_SUSPECT = 3  # looks in a row that found nothing: health tells of it
_EFFORT = 0.01  # the share of a processor's time that counts as work


class Watched(Protocol):
    """A worker, as far as it is watched."""

    heard: bool
    """Whether anything has come from it since this was set to False."""

    @property
    def pid(self) -> int:
        """Its process."""

    @property
    def loading(self) -> bool:
        """Whether it has not said yet that its model is loaded, or cannot be."""

    @property
    def owes(self) -> bool:
        """Whether it has something to do."""

    @property
    def abandoned(self) -> bool:
        """Whether it has not ended yet what was cancelled."""

    def give_up(self, reason: str) -> None:
        """End it."""


class Watch:
    """Looks after one worker; made by its model. Seconds: after `loading`, or `working`, without a sign of life it
    hangs (0: never)."""

    def __init__(self, worker: Watched, loading: float, working: float) -> None:
        self._worker = worker
        self._loading = loading
        self._working = working
        self._interval = min(
            [INTERVAL, *(patience / _LOOKS for patience in (loading, working, ABANDONED) if patience)]
        )
        self._silent = 0.0  # counted in looks: time in which this process was stopped itself does not count
        self._wasted = 0.0
        self._looks = 0
        self._used: float | None = None

    @property
    def complaint(self) -> str:
        """What speaks for it that the worker hangs, in words; "" when nothing does."""
        if self._wasted > ABANDONED / 2:
            return f"it has not ended a cancelled call for {self._wasted:.2g} s"
        if self._looks < _SUSPECT:
            return ""
        return f"it seems to hang: no answer, output or use of the processor for {self._silent:.2g} s"

    async def run(self) -> None:
        """Watch; returns when it was given up."""
        while True:
            loading = self._worker.loading
            patience = self._loading if loading else self._working
            self._worker.heard = False
            await asyncio.sleep(self._interval)
            await self._look()
            if patience and self._silent >= patience and self._worker.loading is loading:
                self._worker.give_up(_verdict(patience, loading=loading))
                return
            if self._wasted >= ABANDONED:
                self._worker.give_up(f"it did not end a cancelled call in {ABANDONED:g} s")
                return

    async def _look(self) -> None:
        worker, before = self._worker, self._used
        self._used = None
        self._wasted = self._wasted + self._interval if worker.abandoned and not worker.heard else 0.0
        if worker.owes and not worker.heard:
            # Its descendants count, too, and they are found by looking at every process there is.
            try:
                self._used = await asyncio.to_thread(_processor_seconds, worker.pid)
            except RuntimeError:  # the system refuses another thread; a worker that hangs must end all the same
                self._used = _processor_seconds(worker.pid)
        if before is None or self._used is None or worker.heard or self._used > before + _EFFORT * self._interval:
            self._silent, self._looks = 0.0, 0
        else:
            self._silent += self._interval
            self._looks += 1


def _verdict(patience: float, *, loading: bool) -> str:
    if loading:
        return f"it hangs while it loads: no output or use of the processor for {patience:g} s (start_timeout)"
    return f"it hangs: no answer, output or use of the processor for {patience:g} s"


def _processor_seconds(pid: int) -> float:
    total = 0.0
    with contextlib.suppress(psutil.Error):
        worker = psutil.Process(pid)
        for process in [worker, *worker.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
    return total
