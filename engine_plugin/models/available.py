"""The available models of an engine, listed within a time limit."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from engine_plugin.models.info import can_serve

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

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
