"""A bounded wait that also works while a cancelled task cleans up."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["comes_true"]


async def comes_true(event: Coroutine[Any, Any, object], within: float) -> bool:
    """Whether `event` ends within so many seconds; what it raises is raised, and late it is cancelled.

    For clean-up, where `asyncio.timeout` is of no use before Python 3.11.4: in a task that was cancelled it
    raises CancelledError in the place of TimeoutError (CPython issue 102780), and the rest of the clean-up is
    lost.
    """
    waiting = asyncio.ensure_future(event)
    try:
        await asyncio.wait({waiting}, timeout=within)
        if waiting.done():
            waiting.result()
            return True
        return False
    finally:
        waiting.cancel()
