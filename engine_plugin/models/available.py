"""The models that an engine has, for those who cannot wait for an engine that is slow to tell them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING

from engine_plugin.download.events import ChunkProgress, Status
from engine_plugin.models.info import can_serve
from engine_plugin.models.request import PullRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from engine_plugin.download.events import PullEvent
    from engine_plugin.models.info import ModelInfo

__all__ = ["AvailableModels", "names_for"]

log = logging.getLogger(__name__)


def names_for(service: str, default: str, models: Sequence[ModelInfo]) -> list[str]:
    """The names of the models that can serve a service, its default model first, the others as they are listed."""
    names = [model.name for model in models if can_serve(service, model.kind, model.capabilities.features)]
    return sorted(names, key=lambda name: name not in (default, f"{default}:latest"))


class AvailableModels:
    """What `ask` said last. Used from one event loop; whoever made it closes it."""

    def __init__(self, ask: Callable[[], Awaitable[Sequence[ModelInfo]]], patience: float = 2.0) -> None:
        """`patience` is how many seconds a caller is kept waiting at most."""
        self._ask = ask
        self._patience = patience
        self._said: Sequence[ModelInfo] = ()
        self._asking: asyncio.Task[None] | None = None

    async def models(self) -> Sequence[ModelInfo]:
        """The models now; those of the last time when the engine is too slow or fails, none when there was none.

        An engine that is slow is waited for in the background, so that who asks next finds what it said.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._look(), name="asking for the models on offer")
        await asyncio.wait({self._asking}, timeout=self._patience)
        return self._said

    async def aclose(self) -> None:
        """Ask no longer."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})

    async def _look(self) -> None:
        try:
            self._said = tuple(await self._ask())
        except Exception as error:  # noqa: BLE001  # a manifest is answered whatever is wrong with the engine
            log.debug("the models on offer are not known: %s", error)


class _Wait:
    """The calls that wait for one model: what one of them hears of its pull is told once."""

    def __init__(self, tell: Callable[[str | ChunkProgress], None]) -> None:
        self.callers = 0
        self._tell = tell
        self._told: set[str] = set()

    def tell(self, event: PullEvent | str) -> None:
        if isinstance(event, ChunkProgress):  # how often these are worth a line is for `tell` to know
            self._tell(event)
        elif isinstance(event, Status | str):
            text = event if isinstance(event, str) else event.text
            if text not in self._told:
                self._told.add(text)
                self._tell(text)


class MissingModels:
    """Owned by a plugin whose manifest has `auto_pull`. `pull` shares what several ask for, as an engine's does."""

    def __init__(
        self,
        pull: Callable[[PullRequest], AsyncGenerator[PullEvent, None]],
        teller: Callable[[], Callable[[str | ChunkProgress], None]],
    ) -> None:
        """`teller` makes one that is told each step of one pull, and how far it is."""
        self._pull = pull
        self._teller = teller
        self._waiting: dict[str, _Wait] = {}

    async def fetch(self, name: str) -> None:
        """Pull the model, or wait for the pull of it that another call began.

        A caller that is cancelled leaves the pull to the others; when the last one leaves, what arrived is kept.
        Raises what the pull raises.
        """
        wait = self._waiting.get(name)
        if wait is None:
            wait = self._waiting[name] = _Wait(self._teller())
        wait.callers += 1
        try:
            wait.tell(f"{name} is not here: pulling it for the call that needs it")
            async with aclosing(self._pull(PullRequest(model=name))) as events:
                async for event in events:
                    wait.tell(event)
            wait.tell(f"{name} is here")
        finally:
            wait.callers -= 1
            if not wait.callers:
                del self._waiting[name]
