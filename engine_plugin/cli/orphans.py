"""Reaps the processes that `serve` inherits as process 1 of a container."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["reaping_orphans"]


@contextlib.contextmanager
def reaping_orphans(interval: float = 5.0) -> Iterator[None]:
    """Inside the block, reap inherited processes that exit and would stay zombies. `interval` is in seconds.

    An orphan becomes a child of process 1. asyncio waits at once for the children that this process spawned, so a
    child that is a zombie in two successive looks was inherited.
    """
    reaping = asyncio.create_task(_keep_reaping(interval))
    try:
        yield
    finally:
        reaping.cancel()


async def _keep_reaping(interval: float) -> None:
    before: set[int] = set()
    while True:
        now = _zombies()
        _reap(before & now)
        before = now - before
        await asyncio.sleep(interval)


def _reap(pids: set[int]) -> None:
    if sys.platform != "win32":
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _zombies() -> set[int]:
    """Return the pids of children that have exited and were not waited for."""
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.status() == psutil.STATUS_ZOMBIE:
                found.add(child.pid)
    return found
