"""The available models of an engine, listed within a time limit; and the pulls of missing models (`auto_pull`)."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, NamedTuple

from engine_plugin.download.events import ChunkProgress, StepStarted, Success
from engine_plugin.models.flights import PullFlights
from engine_plugin.models.info import can_serve
from engine_plugin.models.pull_request import PullRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from engine_plugin.download.events import PullEvent
    from engine_plugin.models.info import ModelInfo

__all__ = ["AvailableModels", "names_for"]

log = logging.getLogger(__name__)


def names_for(service: str, default: str, models: Sequence[ModelInfo]) -> list[str]:
    """The names of the models that can serve a service: the default model first, the others in the given order."""
    names = [model.name for model in models if can_serve(service, model.kind, model.capabilities.features)]
    return sorted(names, key=lambda name: name not in (default, f"{default}:latest"))


class AvailableModels:
    """The latest list of an engine's models. Owned by a plugin, used from one event loop."""

    def __init__(self, ask: Callable[[], Awaitable[Sequence[ModelInfo]]], patience: float = 2.0) -> None:
        """`ask` returns the models; `patience` is the longest wait of a caller, in seconds."""
        self._ask = ask
        self.patience = patience
        self._latest: Sequence[ModelInfo] = ()
        self._asking: asyncio.Task[None] | None = None

    async def models(self) -> Sequence[ModelInfo]:
        """The models; where the engine is slow or fails, the previous ones, () at first.

        A slow engine is still awaited in the background, so that the next caller gets its answer.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._look(), name="list the available models")
        await asyncio.wait({self._asking}, timeout=self.patience)
        return self._latest

    async def aclose(self) -> None:
        """Cancel a running question."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})

    async def _look(self) -> None:
        try:
            self._latest = tuple(await self._ask())
        except Exception as error:  # noqa: BLE001  # GetManifest must not fail with the engine
            log.debug("cannot list the available models: %s", error)


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
