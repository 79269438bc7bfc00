"""The process actor: one owner of one engine subprocess's state.

    stopped ──▶ starting ──▶ ready ◀──▶ degraded
       ▲         │    ▲        │            │
       │         ▼    │        ▼            │
       ├───────── stopping ◀────────────────┘
       │          │   │
    failed ◀──────┘   └──▶ recovering ──▶ starting

(`MOVES` has every transition, docs/design.md says when each is made.)

One task, `_run`, makes every transition from a start to the stop or the final failure; everyone else only asks
(`ensure_ready`, `stop`, `check`) and waits. So a start is shared by all who ask for it, a stop aborts a start and
a back-off, and the end of a process is noticed once, named with its exit code and its last words, and mended.
"""

from __future__ import annotations

import asyncio
import logging

from engine_plugin.errors import EngineStartError, UnavailableError
from engine_plugin.process.restarts import Restarts
from engine_plugin.process.run import Command, Life, ProcessSpec, ProcessState
from engine_plugin.waiting import comes_true

__all__ = ["MOVES", "Command", "EngineProcess", "ProcessSpec", "ProcessState"]

log = logging.getLogger(__name__)

_SERVING = (ProcessState.READY, ProcessState.DEGRADED)

MOVES = {
    ProcessState.STOPPED: {ProcessState.STARTING},
    ProcessState.STARTING: {
        ProcessState.READY,
        ProcessState.STOPPING,
        ProcessState.FAILED,
        ProcessState.RECOVERING,
    },
    ProcessState.READY: {ProcessState.DEGRADED, ProcessState.STOPPING},
    ProcessState.DEGRADED: {ProcessState.READY, ProcessState.STOPPING},
    ProcessState.STOPPING: {ProcessState.STOPPED, ProcessState.RECOVERING, ProcessState.FAILED},
    ProcessState.RECOVERING: {ProcessState.STARTING, ProcessState.STOPPED},
    ProcessState.FAILED: {ProcessState.STARTING},
}
"""Where each state may lead."""


class EngineProcess:
    """One subprocess that can be started, watched, restarted and stopped, any number of times.

    Owned by an engine driver, used from one event loop. `stop` must be awaited before the loop ends.
    """

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.state = ProcessState.STOPPED
        self.failure = ""
        """Why the latest life ended, "" while it serves and after a stop."""
        self.life: Life | None = None
        """The latest life; whoever uses the process keeps it, to learn how it ended."""
        self.ended = asyncio.Event()
        """Set while no process is there and none will come by itself: stopped or failed."""
        self.ended.set()
        self._restarts = Restarts(spec.restart)
        self._task: asyncio.Task[None] | None = None
        self._settled: asyncio.Future[None]  # from the first start on
        self._closed = False
        self._stop_wanted = asyncio.Event()
        self._moved = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The number of the process that runs."""
        return self.life.pid if self.life is not None and not self.ended.is_set() else None

    @property
    def restarts(self) -> int:
        """How often in a row it died without having served for a stable time."""
        return self._restarts.deaths

    async def ensure_ready(self) -> None:
        """Start the process unless it serves, sharing a start or a restart that is under way.

        Raises EngineStartError with the exit code and the last lines, or UnavailableError when a stop came in
        between. Cancelling one waiter leaves the start to the others.
        """
        while self.state is ProcessState.STOPPING or (self._stop_wanted.is_set() and not self.ended.is_set()):
            await self._moved.wait()
        if self._closed:
            raise UnavailableError(f"{self.spec.name} was stopped")
        if self.state in _SERVING:
            return
        settled = self._begin() if self.ended.is_set() else self._settled
        await asyncio.wait({settled})
        settled.result()

    async def recovered(self) -> None:
        """Wait while it is being restarted by itself; starts nothing. Returns at once in any other state."""
        while not self.ended.is_set() and not self._stop_wanted.is_set() and self.state not in _SERVING:
            await self._moved.wait()

    async def stop(self) -> None:
        """Ask, wait, kill if need be, and return when no process of the tree is left. Aborts a start."""
        task = self._task
        if task is None or task.done():
            return
        self._stop_wanted.set()
        await asyncio.wait({task})

    async def close(self) -> None:
        """Stop for good: whoever asks for it, or waits for it by now, gets UnavailableError and no new process."""
        self._closed = True
        await self.stop()

    async def check(self) -> None:
        """Ask a serving process how it is; `state` follows from the latest answers. Called for HealthCheck."""
        if self.state in _SERVING and self.life is not None:
            await self.life.check()

    def _begin(self) -> asyncio.Future[None]:
        self._stop_wanted.clear()
        self.ended.clear()
        settled = self._unsettle()
        self._task = asyncio.create_task(self._run(), name=f"engine process {self.spec.name}")
        return settled

    def _unsettle(self) -> asyncio.Future[None]:
        """From now on whoever asks waits for the outcome of the next start."""
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Whether anyone waits for the outcome of a start is up to them.
        settled.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._settled = settled
        return settled

    def _enter(self, state: ProcessState) -> None:
        if state is self.state:
            return
        if state not in MOVES[self.state]:
            raise RuntimeError(f"{self.spec.name}: no way leads from {self.state.value} to {state.value}")
        log.debug("%s: %s -> %s", self.spec.name, self.state.value, state.value)
        if state is ProcessState.READY:
            self._settle(None)
        elif self.state in _SERVING and state is not ProcessState.DEGRADED:
            self._unsettle()
        if state is ProcessState.DEGRADED:
            log.warning("%s does not answer: it is busy, or hangs", self.spec.name)
        elif state is ProcessState.READY and self.state is ProcessState.DEGRADED:
            log.info("%s answers again", self.spec.name)
        self.state = state
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def _run(self) -> None:
        """Life after life, until a stop or a failure that is final."""
        try:
            while True:
                self.failure = ""
                self._enter(ProcessState.STARTING)
                self.life = Life(self.spec, self._stop_wanted, self._enter)
                await self.life.run()
                self.failure = self.life.failure
                pause = self._pause_after(self.life)
                if pause is None or not await self._recover(pause):
                    return
        finally:
            self._finish()

    def _pause_after(self, life: Life) -> float | None:
        """Seconds until the next start; None when there is none: after a stop, a first start that failed, and one
        death too many."""
        if not life.failure:
            return None
        log.error("%s", life.failure)
        if life.served is None and not self._restarts.deaths:
            return None
        pause = self._restarts.after_death(life.served or 0.0)
        if pause is None and self.spec.restart.limit:
            self.failure += f" (it died {self._restarts.deaths} times in a row and is not restarted by itself again)"
        return pause

    async def _recover(self, pause: float) -> bool:
        """Wait for the back-off; False when a stop came in between."""
        self._enter(ProcessState.RECOVERING)
        log.warning(
            "%s: restarting in %g s (%d of %d)", self.spec.name, pause, self.restarts, self.spec.restart.limit
        )
        return not await comes_true(self._stop_wanted.wait(), within=pause)

    def _finish(self) -> None:
        if self._stop_wanted.is_set():
            self._restarts.forget()
        if self.state is ProcessState.RECOVERING:
            self.failure = ""  # nobody knows whether the restart would have failed
        if self.state is ProcessState.STARTING and not self.failure:
            self._enter(ProcessState.STOPPING)  # cancelled before there was a process
        self._enter(ProcessState.FAILED if self.failure else ProcessState.STOPPED)
        self._settle(
            EngineStartError(self.failure)
            if self.failure
            else UnavailableError(f"{self.spec.name} was stopped while it was starting")
        )
        self.ended.set()

    def _settle(self, error: Exception | None) -> None:
        if self._settled.done():
            return
        if error is None:
            self._settled.set_result(None)
        else:
            self._settled.set_exception(error)
