"""Detects a server that keeps computing for callers that have left."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from engine_plugin.process import tree

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["WITHIN", "Abandoned"]

WITHIN = 30.0
"""Seconds that a server may compute without a caller."""

_SHARE = 0.05  # of a processor: one that is idle takes next to none, one that computes may share it with others
_GLANCE = 0.2  # seconds below which the figure says nothing


class Abandoned:
    """The exchanges of one server: llama.cpp ends one whose caller has left before its answer began only when it
    looks, and does not look while it renders or converts what the request brought."""

    def __init__(self) -> None:
        self._running = 0
        self._left = False
        self._since: tuple[float, float] | None = None  # when no caller was left, and the processor time by then

    @contextmanager
    def exchange(self) -> Iterator[list[bool]]:
        """One exchange; its answer has begun when the list that is given is not empty."""
        begun: list[bool] = []
        self._running += 1
        self._since = None
        try:
            yield begun
        finally:
            self._running -= 1
            self._left = self._left or not begun

    def complaint(self, pid: int | None) -> str:
        """Why the process should be ended; "" when there is no reason. Asked every few seconds."""
        if not self._left or self._running or pid is None:
            return ""
        now, used = time.monotonic(), tree.processor_seconds(pid)
        if self._since is None:
            self._since = now, used
            return ""
        spent, idle = used - self._since[1], now - self._since[0]
        if idle >= _GLANCE and spent < _SHARE * idle:
            self._left, self._since = False, None
            return ""
        return f"it has computed for {idle:.3g} s for callers that had left" if idle >= WITHIN else ""
