"""Detects a worker that hangs: it owes answers, and for long it neither writes output nor uses the processor.

The runner judges a worker from outside, by the output in its pipes and by the processor time that the system counts
for it. The worker sends no heartbeats: a step of a language model keeps Python's lock for seconds, so that no thread
could send one while the worker computes; and a heartbeat would not show whether the pipeline is stuck. Nothing is
done per token: output sets a flag, and the processor time is read only after an interval without output.

A worker that computes is not hung, unless it continues a cancelled call and writes nothing meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from engine_plugin.process.health import ProcessorUse

if TYPE_CHECKING:
    from openvino_server.link import Worker

__all__ = ["ABANDONED", "INTERVAL", "Watch"]

INTERVAL = 5.0
"""The most seconds between two looks. Tests set it."""

ABANDONED = 30.0
"""Seconds in which a worker confirms the end of a cancelled call, or writes anything else, such as a step or a batch
of texts. Tests set it."""

_LOOKS = 8  # at least so many within the time after which a worker is hung
_SUSPECT = 3  # looks in a row without a sign of life, after which health reports the worker


class Watch:
    """Watches one worker. Made by its model."""

    def __init__(self, worker: Worker, loading: float, working: float) -> None:
        """Seconds without a sign of life after which the worker is hung: while it loads, and while it works (0:
        never)."""
        self._worker = worker
        self._processor = ProcessorUse(worker.pid)
        self._loading = loading
        self._working = working
        self._interval = min(
            [INTERVAL, *(patience / _LOOKS for patience in (loading, working, ABANDONED) if patience)]
        )
        self._silent = 0.0  # counted in looks, so that time in which the runner itself was suspended does not count
        self._wasted = 0.0
        self._looks = 0

    @property
    def complaint(self) -> str:
        """The signs that the worker hangs; "" without any."""
        if self._wasted > ABANDONED / 2:
            return f"it has not ended a cancelled call for {self._wasted:.2g} s"
        if self._looks < _SUSPECT:
            return ""
        return f"it seems to hang: no answer, output or use of the processor for {self._silent:.2g} s"

    async def run(self) -> None:
        """Watch until the worker is hung, and give it up then."""
        while True:
            loading = self._worker.loading
            patience = self._loading if loading else self._working
            self._worker.heard = False
            await asyncio.sleep(self._interval)
            await self._look()
            if patience and self._silent >= patience and self._worker.loading is loading:
                which = "it hangs while it loads: no" if loading else "it hangs: no answer,"
                option = " (start_timeout)" if loading else ""
                self._worker.give_up(f"{which} output or use of the processor for {patience:g} s{option}")
                return
            if self._wasted >= ABANDONED:
                self._worker.give_up(f"it did not end a cancelled call in {ABANDONED:g} s")
                return

    async def _look(self) -> None:
        worker = self._worker
        self._wasted = self._wasted + self._interval if worker.abandoned and not worker.heard else 0.0
        computed: bool | None = None
        if worker.owes and not worker.heard:
            computed = await self._processor.grew(self._interval)
        else:
            self._processor.forget()
        if computed is False and not worker.heard:
            self._silent += self._interval
            self._looks += 1
        else:
            self._silent, self._looks = 0.0, 0
