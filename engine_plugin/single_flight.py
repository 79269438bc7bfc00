"""Runs work once for all callers that ask at the same time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from engine_plugin.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["SingleFlight"]

Result = TypeVar("Result")


class SingleFlight(Generic[Result]):
    """At most one run of a coroutine. All callers that join it get its result or its exception.

    A cancelled caller leaves the run to the others; `cancel` ends it for all.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._task: asyncio.Task[Result] | None = None
        self._cancelling: asyncio.Task[Result] | None = None

    @property
    def running(self) -> bool:
        """Whether a run is in progress."""
        return self._task is not None and not self._task.done()

    async def run(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Join the run, or begin one. Raises UnavailableError if it was cancelled.

        A run that is being cancelled is not joined: a new one begins after its clean-up.
        """
        while self._cancelling is not None and not self._cancelling.done():
            await asyncio.wait({self._cancelling})
        task = self._task
        if task is None or task.done():
            task = self._task = asyncio.create_task(work(), name=self._name)
            # Without a caller its exception would be reported as never retrieved.
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        # like gather, but each caller gets the exception.
        await asyncio.wait({task})
        if task.cancelled():
            raise UnavailableError(f"{self._name} was interrupted by a stop")
        return task.result()

    async def cancel(self) -> None:
        """Cancel the run, if any, and wait for its clean-up."""
        task = self._task
        if task is not None and not task.done():
            self._cancelling = task
            task.cancel()
            await asyncio.wait({task})
