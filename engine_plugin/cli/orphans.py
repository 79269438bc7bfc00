"""Reaps the processes that `serve` inherits as process 1 of a container."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["reaping_orphans"]

_SETTLED = 1.0  # seconds, after which asyncio has waited for any child that this process spawned


@contextlib.contextmanager
def reaping_orphans() -> Iterator[None]:
    """Inside the block, reap inherited processes that exit and would stay zombies.

    An orphan becomes a child of process 1. asyncio waits at once for the children that this process spawned, so a
    child that is still a zombie a second later was inherited.
    """
    if sys.platform == "win32" or not _inherits():
        yield
        return
    loop = asyncio.get_running_loop()
    looking: list[asyncio.TimerHandle] = []

    def look_soon() -> None:
        if not looking:
            looking.append(loop.call_later(_SETTLED, look, _zombies()))

    def look(before: set[int]) -> None:
        looking.clear()
        now = _zombies()
        for pid in before & now:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if now - before:
            look_soon()

    loop.add_signal_handler(signal.SIGCHLD, look_soon)
    look_soon()
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGCHLD)
        for handle in looking:
            handle.cancel()


def _inherits() -> bool:
    return os.getpid() == 1


def _zombies() -> set[int]:
    """Return the pids of children that have exited and were not waited for."""
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.status() == psutil.STATUS_ZOMBIE:
                found.add(child.pid)
    return found
