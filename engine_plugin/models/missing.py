"""The pulls of missing models that calls need (`auto_pull`)."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, NamedTuple

from engine_plugin.download.events import ChunkProgress, StepStarted, Success
from engine_plugin.models.flights import PullFlights
from engine_plugin.models.pull_request import PullRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from engine_plugin.download.events import PullEvent

__all__ = ["MissingModels"]


class _Missing(NamedTuple):
    """The plan of a pull that a call needs."""

    name: str


class MissingModels:
    """The pulls of missing models, for a manifest with `auto_pull`. Owned by a plugin."""

    def __init__(
        self,
        pull: Callable[[PullRequest], AsyncGenerator[PullEvent, None]],
        reporter: Callable[[], Callable[[str | ChunkProgress], None]],
    ) -> None:
        """`pull` is the engine's; `reporter` returns a callback for the steps and the progress of one pull."""
        self._pull = pull
        self._reporter = reporter
        self._flights: PullFlights[_Missing] = PullFlights(self._run, key=str)

    async def fetch(self, name: str) -> None:
        """Pull a model, or wait for the pull that another call began.

        A cancelled caller leaves the pull to the others; the last one cancels it, and a later pull resumes. Raises
        what the pull raises.
        """

        async def plan() -> _Missing:
            return _Missing(name)

        async with aclosing(self._flights.pull(plan)) as events:
            async for _ in events:
                pass  # `_run` tells them once for all callers

    async def aclose(self) -> None:
        """Cancel the running pulls and wait for their end."""
        await self._flights.aclose()

    async def _run(self, plan: _Missing, _publish: Callable[[PullEvent], None]) -> Success:
        report, steps_seen = self._reporter(), set()
        report(f"pulling {plan.name}, which a call needs")
        success = Success(plan.name, 0, "")
        async with aclosing(self._pull(PullRequest(model=plan.name))) as events:
            async for event in events:
                if isinstance(event, ChunkProgress):  # `report` limits their rate
                    report(event)
                elif isinstance(event, StepStarted) and event.text not in steps_seen:
                    steps_seen.add(event.text)
                    report(event.text)
                elif isinstance(event, Success):
                    success = event
        report(f"pulled {plan.name}")
        return success
