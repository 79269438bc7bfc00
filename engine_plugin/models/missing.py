"""Models that a call asked for and that are not here: pulled, once however many calls wait for one."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import aclosing
from typing import TYPE_CHECKING

from engine_plugin.download.events import ChunkProgress, Status
from engine_plugin.models.request import PullRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from engine_plugin.download.events import PullEvent

__all__ = ["MissingModels"]

log = logging.getLogger(__name__)


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
        self._waiting: Counter[str] = Counter()

    async def fetch(self, name: str) -> None:
        """Pull the model, or wait for the pull of it that another call began; only the first tells of it.

        A caller that is cancelled leaves the pull to the others; when the last one leaves, what arrived is kept.
        Raises what the pull raises.
        """
        tell = None if self._waiting[name] else self._teller()
        self._waiting[name] += 1
        try:
            if tell is not None:
                tell(f"{name} is not here: pulling it for the call that needs it")
            async with aclosing(self._pull(PullRequest(model=name))) as events:
                async for event in events:
                    if tell is not None and isinstance(event, Status | ChunkProgress):
                        tell(event if isinstance(event, ChunkProgress) else event.text)
            if tell is not None:
                tell(f"{name} is here")
        finally:
            self._waiting[name] -= 1
            if not self._waiting[name]:
                del self._waiting[name]
