"""Work that is done once however many ask for it at the same time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from engine_plugin.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["SharedWork"]

Result = TypeVar("Result")


class SharedWork(Generic[Result]):
    """At most one run of a coroutine; all who ask while it runs get its result or its exception.

    A caller that is cancelled leaves the run to the others; `cancel` ends it for all.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._task: asyncio.Task[Result] | None = None
        self._cancelling: asyncio.Task[Result] | None = None

    @property
    def running(self) -> bool:
        """Whether there is a run."""
        return self._task is not None and not self._task.done()

    async def run(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Join the run, beginning it if there is none. Raises UnavailableError when it was cancelled.

        One that is being cancelled is not joined: when it has cleaned up, a new one begins.
        """
        while self._cancelling is not None and not self._cancelling.done():
            await asyncio.wait({self._cancelling})
        task = self._task
        if task is None or task.done():
            task = self._task = asyncio.create_task(work(), name=self._name)
            # Without a caller its exception would be reported as never retrieved.
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        # gather-like waiting without retrieving: the exception is handed to each caller.
        await asyncio.wait({task})
        if task.cancelled():
            raise UnavailableError(f"{self._name} was interrupted by a stop")
        return task.result()

    async def cancel(self) -> None:
        """End the run, if there is one, and wait until it has cleaned up."""
        task = self._task
        if task is not None and not task.done():
            self._cancelling = task
            task.cancel()
            await asyncio.wait({task})
