"""One pull that several callers watch: it runs while anybody does."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from engine_plugin.download.events import ChunkProgress, Status, Success
from engine_plugin.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from engine_plugin.download.events import PullEvent

__all__ = ["MOST_PULLS", "SharedPull"]

MOST_PULLS = 16
"""Pulls that run at once in one store, the others wait for their turn: each holds some files open."""


_MOST = 1000
"""Events that wait for one caller at most: a server may tell ever new ones."""


class _Plan(Protocol):
    """What a pull does."""

    @property
    def name(self) -> str:
        """The model that it brings."""


PlanT = TypeVar("PlanT", bound=_Plan)


class _Watcher:
    """One caller's queue: every status, but only the latest progress between two of them."""

    def __init__(self) -> None:
        self.events: deque[PullEvent] = deque()
        self.wake = asyncio.Event()

    def put(self, event: PullEvent) -> None:
        if self._continues(event):
            self.events[-1] = event
        else:
            if len(self.events) == _MOST:  # who reads so slowly is better served with the end than with the beginning
                self.events.popleft()
            self.events.append(event)
        self.wake.set()

    def _continues(self, event: PullEvent) -> bool:
        """Whether it is the same file that goes on: of another one, the last that was told must stay."""
        last = self.events[-1] if self.events else None
        return isinstance(event, ChunkProgress) and isinstance(last, ChunkProgress) and event.digest == last.digest


class SharedPull(Generic[PlanT]):
    """A running pull. The task is started at once; `abandoned` is set when its last watcher has left it."""

    def __init__(
        self,
        plan: PlanT,
        run: Callable[[PlanT, Callable[[PullEvent], None]], Awaitable[Success]],
        turns: asyncio.Semaphore,
        ended: Callable[[], object],
    ) -> None:
        """Begin when one of the `turns` is free. `ended` is called when the pull is over, before
        its waiters resume."""
        self.plan = plan
        self.abandoned = False
        self._watchers: list[_Watcher] = []
        self._status: Status | None = None
        self._progress: ChunkProgress | None = None
        self._task = asyncio.create_task(self._drive(run, turns), name=f"pull {plan.name}")
        self._task.add_done_callback(lambda _: ended())
        self._task.add_done_callback(self._ended)

    async def _drive(
        self, run: Callable[[PlanT, Callable[[PullEvent], None]], Awaitable[Success]], turns: asyncio.Semaphore
    ) -> Success:
        if turns.locked():
            self._publish(Status("waiting for other pulls to end"))
        async with turns:
            return await run(self.plan, self._publish)

    def _publish(self, event: PullEvent) -> None:
        if isinstance(event, ChunkProgress):
            self._progress = event
        elif isinstance(event, Status):
            self._status = event
        for watcher in self._watchers:
            watcher.put(event)

    def _ended(self, task: asyncio.Task[Success]) -> None:
        if not task.cancelled():
            task.exception()  # retrieved, also when nobody watches any more
        for watcher in self._watchers:
            watcher.wake.set()

    async def watch(self) -> AsyncGenerator[PullEvent, None]:
        """What happens from now on, beginning with where the pull stands; ends after Success or raises.

        Closing it leaves the pull; the last one to leave ends it, and waits until it has ended.
        """
        watcher = _Watcher()
        for event in (self._status, self._progress):
            if event is not None:
                watcher.put(event)
        self._watchers.append(watcher)
        try:
            while True:
                while watcher.events:
                    yield watcher.events.popleft()
                if self._task.done():
                    break
                watcher.wake.clear()
                await watcher.wake.wait()
            if self._task.cancelled():
                raise UnavailableError("model: the plugin is stopping; what arrived is kept for the next pull.")
            yield self._task.result()
        finally:
            self._watchers.remove(watcher)
            if not self._watchers and not self._task.done():
                await self.stop()

    async def stop(self) -> None:
        """Cancel the pull and wait until it has let go of its files."""
        self.abandoned = True
        self._task.cancel()
        await self.ended()

    async def ended(self) -> None:
        """Wait until the pull has ended, however."""
        await asyncio.wait({self._task})
