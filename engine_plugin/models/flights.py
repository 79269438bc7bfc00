"""Single flight of pulls: concurrent pulls of one model share one task, which runs while a caller watches it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from engine_plugin.download.events import ChunkProgress, StepStarted, Success
from engine_plugin.errors import PreconditionError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from engine_plugin.download.events import PullEvent

__all__ = ["PullFlights"]

_MOST_PULLS = 16
"""Pulls of one store that run at once, since each holds some files open; the others wait."""
_MOST_EVENTS = 1000
"""Events that wait for one caller; the oldest are dropped, since a server may send ever new ones."""


class _Plan(Protocol):
    """What a pull does. Callers with equal plans share it."""

    @property
    def name(self) -> str:
        """The name of the model in the store."""


PlanT = TypeVar("PlanT", bound=_Plan)


class _Flight(Generic[PlanT]):
    """One running pull. `abandoned` is set when it has been cancelled."""

    def __init__(self, plan: PlanT) -> None:
        self.plan = plan
        self.abandoned = False
        self.watchers: list[deque[PullEvent]] = []
        self.news = asyncio.Event()
        """Set at each event, which replaces it by a new one, and at the end."""
        self.task: asyncio.Task[Success]
        self._latest: dict[type, PullEvent] = {}

    def publish(self, event: PullEvent) -> None:
        """Pass an event on to every caller. Of the progress of one file only the latest waits to be read."""
        self._latest[type(event)] = event
        for events in self.watchers:
            last = events[-1] if events else None
            if isinstance(event, ChunkProgress) and isinstance(last, ChunkProgress) and event.digest == last.digest:
                events[-1] = event
            else:
                events.append(event)
        self.news.set()
        self.news = asyncio.Event()

    def watch(self) -> deque[PullEvent]:
        """The events of a new caller, beginning with the latest step and progress. `leave` ends it."""
        events = deque(self._latest.values(), _MOST_EVENTS)
        self.watchers.append(events)
        return events

    async def leave(self, events: deque[PullEvent]) -> None:
        """End a `watch`. The last caller to leave cancels the pull."""
        self.watchers = [one for one in self.watchers if one is not events]
        if not self.watchers and not self.task.done():
            await self.stop()

    async def stop(self) -> None:
        """Cancel the pull and wait until it has closed its files."""
        self.abandoned = True
        self.task.cancel()
        await asyncio.wait({self.task})


class PullFlights(Generic[PlanT]):
    """The running pulls of one store. Used from one event loop; its owner closes it."""

    def __init__(
        self,
        run: Callable[[PlanT, Callable[[PullEvent], None]], Awaitable[Success]],
        key: Callable[[str], str] = str.casefold,
    ) -> None:
        """`run` pulls and publishes its events; names with an equal `key` are one model."""
        self._run = run
        self._key = key
        self._flights: dict[str, _Flight[PlanT]] = {}
        self._turns = asyncio.Semaphore(_MOST_PULLS)

    async def pull(
        self,
        plan: Callable[[], Awaitable[PlanT | Success]],
        finish: Callable[[Success], Awaitable[None]] | None = None,
    ) -> AsyncGenerator[PullEvent, None]:
        """Start or join the pull that `plan` makes and yield its events; ends after Success, or raises.

        `plan` may return the Success of a model that needs no pull. `finish` runs for each caller before its Success.
        Closing the iterator leaves the pull; the last caller to leave cancels it and waits for its end. Raises what
        `plan` and the pull raise; PreconditionError while the model is pulled by another plan; UnavailableError when
        the store closes.
        """
        planned = await plan()
        if isinstance(planned, Success):
            yield planned
            return
        flight = await self._join(planned)
        events = flight.watch()
        try:
            while True:
                while events:
                    yield events.popleft()
                if flight.task.done():
                    break
                await flight.news.wait()
            if flight.task.cancelled():
                raise UnavailableError("model: the plugin is stopping; what arrived is kept for the next pull.")
            success = flight.task.result()
            if finish is not None:
                await finish(success)
            yield success
        finally:
            await flight.leave(events)

    async def aclose(self) -> None:
        """Cancel the running pulls and wait for their end."""
        for flight in list(self._flights.values()):
            await flight.stop()

    async def _join(self, plan: PlanT) -> _Flight[PlanT]:
        """The running pull of that plan, else a new one. Its caller must watch it without awaiting in between."""
        key = self._key(plan.name)
        while (flight := self._flights.get(key)) is not None:
            if not flight.abandoned and flight.plan == plan:
                return flight
            if not flight.abandoned:
                raise PreconditionError(
                    f"model: {flight.plan.name} is being pulled now from another source or with other settings; "
                    "wait for that pull or cancel it."
                )
            await asyncio.wait({flight.task})
        flight = self._flights[key] = _Flight(plan)
        flight.task = asyncio.create_task(self._drive(flight), name=f"pull {plan.name}")

        def ended(task: asyncio.Task[Success]) -> None:
            del self._flights[key]
            if not task.cancelled():
                task.exception()  # retrieved also where no caller watches any more
            flight.news.set()

        flight.task.add_done_callback(ended)
        return flight

    async def _drive(self, flight: _Flight[PlanT]) -> Success:
        if self._turns.locked():
            flight.publish(StepStarted("waiting for other pulls to end"))
        async with self._turns:
            return await self._run(flight.plan, flight.publish)
