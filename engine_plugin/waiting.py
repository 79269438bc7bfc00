"""Workarounds for asyncio: bounded waits in clean-up, and signals that arrive while the loop sleeps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator
    from types import FrameType
    from typing import TypeAlias

    Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | None

__all__ = [
    "comes_true",
    "handle_signal",
    "handling_signals",
    "run_to_the_end",
    "watch_children_without_threads",
]

_T = TypeVar("_T")


def run_to_the_end(main: Coroutine[Any, Any, _T]) -> _T:
    """`asyncio.run` for a process that must exit in order even if the system refuses another thread.

    asyncio joins its executor's threads in another thread. If that cannot be created, `main` has ended anyway, and
    the interpreter joins them as it exits.
    """
    results: list[_T] = []

    async def keep() -> None:
        results.append(await main)

    watch_children_without_threads()
    try:
        asyncio.run(keep())
    except RuntimeError:
        if not results:
            raise
    return results[0]


def watch_children_without_threads() -> None:
    """As Python 3.12 does by default: 3.11 creates a thread for each child, and loses the child if it cannot.

    Called for a process that runs one event loop: in Python 3.11 the watcher forgets the children of the loop before.
    """
    if sys.platform == "linux" and sys.version_info < (3, 12):
        with contextlib.suppress(OSError):  # no such call in this kernel or sandbox
            os.close(os.pidfd_open(os.getpid()))
            asyncio.set_child_watcher(asyncio.PidfdChildWatcher())


async def comes_true(event: Coroutine[Any, Any, object], within: float) -> bool:
    """Wait for `event`: True if it ends within so many seconds, else it is cancelled. Raises what it raises.

    For clean-up, where `asyncio.timeout` of early Python 3.11 fails (seen in 3.11.2, not in 3.11.7): in a task that
    was cancelled it raises CancelledError instead of TimeoutError (CPython issue 102780), which aborts the clean-up.
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


def handle_signal(number: int, handler: Handler) -> None:
    """`signal.signal` for a main thread that runs the current event loop, which the signal then wakes.

    Python calls a handler between two steps of the main thread. A signal that arrives just before the loop begins to
    wait would go unnoticed until something else wakes the loop; the loop's own handler, which does nothing else here,
    makes the signal wake it. (On Windows every signal does.)
    """
    with contextlib.suppress(NotImplementedError):
        asyncio.get_running_loop().add_signal_handler(number, lambda: None)
    signal.signal(number, handler)


@contextlib.contextmanager
def handling_signals(numbers: Iterable[int], handler: Handler) -> Iterator[None]:
    """Inside the block, handle these signals as `handle_signal` does; then restore the previous handlers."""
    before: dict[int, Handler] = {number: signal.getsignal(number) for number in numbers}
    for number in before:
        handle_signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            handle_signal(number, previous)
