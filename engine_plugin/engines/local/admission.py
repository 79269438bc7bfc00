"""How many requests an engine process gets at once, and how many may wait for their turn."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from engine_plugin import catalogue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["Admission", "ClosedError"]


class ClosedError(Exception):
    """The engine's process is leaving. A call in the queue has not begun, and may go to its successor."""


class Admission:
    """First come, first served access to `capacity` slots; at most `max_waiting` requests wait.

    The engine is never given more than it can run: a request queued inside llama.cpp would not notice that its
    caller has gone.
    """

    def __init__(self, capacity: int, max_waiting: int) -> None:
        self._capacity = capacity
        self._free = capacity
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def close(self) -> None:
        """Give no more turns; all that wait for one get ClosedError."""
        self._closed = True
        while self._waiting:
            _count, turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(ClosedError())

    @asynccontextmanager
    async def slots(self, count: int) -> AsyncIterator[None]:
        """Hold `count` slots (no more than there are). Raises UnavailableError when too many wait already, and
        ClosedError."""
        count = max(1, min(count, self._capacity))
        await self._take(count)
        try:
            yield
        finally:
            self._release(count)

    async def _take(self, count: int) -> None:
        if self._closed:
            raise ClosedError
        if self._free >= count and not self._waiting:
            self._free -= count
            return
        if self.waiting >= self._max_waiting:
            raise catalogue.QUEUE_FULL.error(
                waiting=f"{self.waiting} requests wait already (engine.max_queue in plugin.yaml)"
            )
        turn = asyncio.get_running_loop().create_future()
        place = (count, turn)
        self._waiting.append(place)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._release(count)  # it was our turn at the very moment we were cancelled
            else:
                if place in self._waiting:  # `_admit` drops the cancelled ones that it meets
                    self._waiting.remove(place)
                self._admit()
            raise

    def _release(self, count: int) -> None:
        self._free += count
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            count, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= count
                turn.set_result(None)
