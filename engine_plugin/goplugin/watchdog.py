"""Two watchdogs outside the event loop: for the host's death, and for a shutdown that takes too long.

A host that crashes sends no signal, and its plugin would go on running with the engine and its memory. Threads
watch, so that a blocked event loop does not matter.
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

_POLL_INTERVAL = 0.5  # seconds between looks, where the system has no event for a parent's end

_log = logging.getLogger(__name__)


def watch_host(parent: int, gone: Callable[[], None]) -> None:
    """Call `gone`, in a thread, when the host has died. `parent` is os.getppid() at the process's start."""

    def watch() -> None:
        wait_until_host_gone(parent)
        gone()

    threading.Thread(target=watch, name="watch-host", daemon=True).start()


def wait_until_host_gone(parent: int) -> None:
    """Return when `parent` is no longer the parent of this process.

    A parent of 1 is watched too: the host may be init of a container (ipykernel #233).
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
        """Return when `parent` has ended, or at once where the system has no event for it."""
        try:
            fd = os.pidfd_open(parent)
        except OSError:  # already ended, not permitted, or no such call in this kernel or sandbox
            return
        try:
            # The pid names the intended process only while it is still the parent.
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
            if host.create_time() <= psutil.Process().create_time():  # else the pid was reused
                host.wait()
        except psutil.NoSuchProcess:
            return


class LastResort:
    """Kills the process when its shutdown hangs: a blocked loop, an executor's thread, a library's exit handler.

    The process then exits with `exit_code`, after `flush`, which must be bounded. The thread is created at the start:
    at the shutdown the system may refuse another (a full pids cgroup, `ulimit -v`).
    """

    def __init__(self, flush: Callable[[], None]) -> None:
        self.exit_code = 1
        self._flush = flush
        self._armed: queue.SimpleQueue[float] = queue.SimpleQueue()  # `put` is reentrant, as a signal handler needs
        threading.Thread(target=self._wait, name="last-resort", daemon=True).start()

    def arm(self, seconds: float) -> None:
        """Kill the process in `seconds`. Only the first call counts. Called from any thread or a signal handler."""
        self._armed.put(seconds)

    def _wait(self) -> None:
        seconds = self._armed.get()
        time.sleep(seconds)
        if self.exit_code:
            _log.error("the plugin did not exit within %.1f s and is killed", seconds)
        self._flush()
        os._exit(self.exit_code)
