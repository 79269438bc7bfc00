"""Detects a server that keeps computing for disconnected callers."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from engine_plugin.process import tree

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TIMEOUT", "AbandonedWorkDetector"]

TIMEOUT = 30.0
"""Seconds that a server may compute without callers."""

_IDLE_SHARE = 0.05  # of a processor: an idle server takes less, a computing one more, even on a busy machine
_SHORTEST_INTERVAL = 0.2  # seconds; the share of a shorter interval is not significant


class AbandonedWorkDetector:
    """Tracks the exchanges of one server.

    llama.cpp does not detect a disconnected caller while it renders a template or converts a grammar, before the
    answer begins.
    """

    def __init__(self) -> None:
        self._running = 0
        self._disconnected = False
        self._since: tuple[float, float] | None = None  # since when there is no caller, and the processor time then

    @contextmanager
    def exchange(self) -> Iterator[list[bool]]:
        """Track an exchange. The caller appends to the list when the answer begins."""
        started: list[bool] = []
        self._running += 1
        self._since = None
        try:
            yield started
        finally:
            self._running -= 1
            self._disconnected = self._disconnected or not started

    def problem(self, pid: int | None) -> str:
        """Why the process must be killed; "" if there is no reason. Called every few seconds."""
        if not self._disconnected or self._running or pid is None:
            return ""
        now, used = time.monotonic(), tree.processor_seconds(pid)
        if self._since is None:
            self._since = now, used
            return ""
        spent, idle = used - self._since[1], now - self._since[0]
        if idle >= _SHORTEST_INTERVAL and spent < _IDLE_SHARE * idle:
            self._disconnected, self._since = False, None
            return ""
        return f"it has computed for {idle:.3g} s for disconnected callers" if idle >= TIMEOUT else ""
