"""Two watchers that need no event loop: one for the host's death, one for an end that takes too long.

A host that crashes sends no signal, and its plugin would live on with the engine and its memory. Threads watch,
so that a plugin whose loop stands is noticed too.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LastResort", "wait_until_host_gone", "watch_host"]

_POLL_INTERVAL = 0.5  # seconds, where the system cannot tell of a parent's end

_log = logging.getLogger(__name__)


def watch_host(parent: int, gone: Callable[[], None]) -> None:
    """Call `gone`, in a thread, when the host has died. `parent` is os.getppid() as read at the process's start."""

    def watch() -> None:
        wait_until_host_gone(parent)
        gone()

    threading.Thread(target=watch, name="watch-host", daemon=True).start()


def wait_until_host_gone(parent: int) -> None:
    """Return when the process `parent` is our parent no more.

    A parent of 1 is watched like any other: as init of a container it may well be the host (ipykernel #233).
    """
    if sys.platform == "win32":
        _wait_on_windows(parent)
        return
    if sys.platform == "linux":
        _wait_for_pidfd(parent)
    while os.getppid() == parent:
        time.sleep(_POLL_INTERVAL)


if sys.platform == "linux":

    def _wait_for_pidfd(parent: int) -> None:
        """Return when `parent` has ended, or at once when the system cannot tell."""
        try:
            fd = os.pidfd_open(parent)
        except OSError:  # gone already, or not allowed, or no such call in this kernel or sandbox
            return
        try:
            # Only while it is still our parent does the number name the process that was meant.
            if os.getppid() == parent:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                poll.poll()
        finally:
            os.close(fd)


if sys.platform == "win32":

    def _wait_on_windows(parent: int) -> None:
        import psutil

        try:
            host = psutil.Process(parent)
            if host.create_time() <= psutil.Process().create_time():  # else the number was given to another
                host.wait()
        except psutil.NoSuchProcess:
            return


class LastResort:
    """Ends the process when its end hangs: a stuck loop, an executor's thread, a library's exit handler.

    `exit_code` is what the process then exits with; `flush` is called first and must be bounded. Its thread waits
    from the beginning: when the end comes, the system may refuse to create one (a full pids cgroup, `ulimit -v`).
    """

    def __init__(self, flush: Callable[[], None]) -> None:
        self.exit_code = 1
        self._flush = flush
        self._armed: queue.SimpleQueue[float] = queue.SimpleQueue()  # its `put` may interrupt itself, in a handler
        threading.Thread(target=self._wait, name="last-resort", daemon=True).start()

    def arm(self, seconds: float) -> None:
        """End the process `seconds` from now. Only the first call counts. Any thread, or a signal handler."""
        self._armed.put(seconds)

    def _wait(self) -> None:
        seconds = self._armed.get()
        time.sleep(seconds)
        if self.exit_code:
            _log.error("the plugin did not end within %.1f s and is cut off", seconds)
        self._flush()
        os._exit(self.exit_code)
