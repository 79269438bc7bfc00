"""The models that an engine has, for those who cannot wait for an engine that is slow to tell them."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from engine_plugin.models.info import can_serve

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from engine_plugin.models.info import ModelInfo

__all__ = ["Offer", "names_for"]

log = logging.getLogger(__name__)


def names_for(service: str, default: str, models: Sequence[ModelInfo]) -> list[str]:
    """The names of the models that can serve a service, its default model first, the others as they are listed."""
    names = [model.name for model in models if can_serve(service, model.kind, model.capabilities.features)]
    return sorted(names, key=lambda name: name not in (default, f"{default}:latest"))


class Offer:
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
