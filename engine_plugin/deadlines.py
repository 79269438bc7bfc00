"""The deadline of each call.

A service call has plugin.yaml's `timeout`, or the host's deadline if that is shorter. Hosts call the engine's
lifecycle without a deadline, so this module sets one.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from engine_plugin import catalogue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from engine_plugin.manifest import ServiceSpec

__all__ = ["CHECK", "HEALTH", "INSTALL", "LOAD", "START", "STOP", "UNARY", "allowed", "deadline"]

UNARY = 60.0
STREAM = 300.0

CHECK = 30.0
HEALTH = 10.0
INSTALL = 3600.0
LOAD = 3600.0
START = 300.0
STOP = 60.0

_LOOK = "Try again; the log of the plugin may show what took so long"


def allowed(service: ServiceSpec, mode: str) -> float | None:
    """Seconds that plugin.yaml allows a call of `service`; None: no deadline. `mode`: unary, stream or bidi."""
    if service.timeout > 0:
        return float(service.timeout)
    if service.timeout < 0 or mode == "bidi":
        return None
    return STREAM if mode == "stream" else UNARY


@asynccontextmanager
async def deadline(seconds: float | None, what: str, remedy: str = _LOOK) -> AsyncIterator[None]:
    """Cancel the block after `seconds` and raise DeadlineError instead."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise catalogue.DEADLINE_EXCEEDED.error(what=what, seconds=seconds, remedy=remedy) from None
