"""Receivers of the answers to one call. `EventStream` (stream.py) is one, `OneResult` another."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvino_server.errors import RequestError

__all__ = ["OneResult", "Sink"]


class Sink:
    """Receives the answers to one call. The methods run on the loop and must not block.

    Subclasses override those that concern them.
    """

    def part(self, payload: list[Any]) -> None:
        """New tokens, as items (index, delta, token count, logprobs, finish reason), or progress: (step, total)."""

    def done(self, payload: dict[str, Any]) -> None:
        """The call has succeeded; `payload` is the rest of its result."""

    def failed(self, error: RequestError) -> None:
        """The call has failed."""

    def flush(self) -> None:
        """The end of a batch: all frames that have arrived are handled."""


class OneResult(Sink):
    """The result of a call as a future; `on_part` gets the tokens before."""

    def __init__(self, on_part: Callable[[list[Any]], None] | None) -> None:
        self.result: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._on_part = on_part

    def part(self, payload: list[Any]) -> None:
        if self._on_part is not None:
            self._on_part(payload)

    def done(self, payload: dict[str, Any]) -> None:
        if not self.result.done():
            self.result.set_result(payload)

    def failed(self, error: RequestError) -> None:
        if not self.result.done():
            self.result.set_exception(error)
