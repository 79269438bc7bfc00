"""How long a test waits, from what this machine can do.

A number of seconds in a test means seconds on an ordinary machine at rest. No test compares it with the clock as it
is: `patience` makes it a bound after which something certainly hangs, `pace` a time that a test gives the product on
purpose (a time limit, a pause). Both grow with the time that starting Python took when the session began, and with
the present load.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, TypeVar

import psutil

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["LIMIT", "NEVER", "pace", "patience", "slowness", "until", "within"]

T = TypeVar("T")
_SPAWN_AT_REST = 0.02  # seconds that an ordinary machine takes to start Python with nothing else to do
_SPARE = 6.0  # a bound costs nothing until it is reached, and the load may grow after the wait has begun
_LOOK = 0.005


def _spawn_seconds() -> float:
    """The longest of a few starts of Python, which take the processor, the disk and the scheduler."""
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
        taken.append(time.perf_counter() - began)
    return max(taken)


SPAWN_SECONDS = _spawn_seconds()


def slowness() -> float:
    """How many times longer than at rest everything takes just now; 1 or more."""
    waiting = psutil.getloadavg()[0] / (os.cpu_count() or 1)
    return max(1.0, SPAWN_SECONDS / _SPAWN_AT_REST, waiting)


def pace(seconds: float) -> float:
    """A time limit or pause of the product which a test makes short, so that this machine still keeps up with it."""
    return seconds * slowness()


def patience(seconds: float = 10.0) -> float:
    """The bound of a wait for what takes at most `seconds` at rest; only what never comes reaches it."""
    return _SPARE * pace(seconds)


LIMIT = patience()
"""Bounds every wait that has no bound of its own."""
NEVER = 86_400.0
"""A time limit of the product that must play no part: a test that lasts until then fails by its own bound."""


async def within(awaitable: Awaitable[T], seconds: float = 10.0) -> T:
    """The outcome of something that takes at most `seconds` at rest and must not hang."""
    async with asyncio.timeout(patience(seconds)):
        return await awaitable


async def until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait for something that sends no event: a file, another process's end."""
    ends = time.monotonic() + patience(seconds)
    while not condition():
        assert time.monotonic() < ends, f"it does not come true: {what}"
        await asyncio.sleep(_LOOK)
