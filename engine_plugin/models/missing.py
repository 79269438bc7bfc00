"""Models that a call asked for and that are not here: pulled, once however many calls wait for one."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from engine_plugin.download.events import ChunkProgress, Status
from engine_plugin.models.request import PullRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from engine_plugin.download.events import PullEvent

__all__ = ["MissingModels"]


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
