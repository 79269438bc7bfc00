"""Two watchdogs: for the host's death, and for a shutdown that takes too long. POSIX needs no thread for either.

A host that crashes sends no signal, and its plugin would go on running with the engine and its memory.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import select
import signal
import sys
import threading
from io import FileIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["LastResort", "watching_host"]

_POLL_INTERVAL = 0.5  # seconds between looks, where the system has no event for a parent's end

_AGAIN = 0.05  # seconds between the signals of the last resort
_AFTER_START = 0.5  # seconds: what a blocked loop needs is loaded after the host's first calls

_log = logging.getLogger(__name__)


if sys.platform == "win32":

    def _wait_on_windows(parent: int, gone: Callable[[], None]) -> None:
        import psutil

        try:
            host = psutil.Process(parent)
            if host.create_time() <= psutil.Process().create_time():  # else the pid was reused
                host.wait()
        except psutil.NoSuchProcess:
            pass
        gone()

    @contextlib.contextmanager
    def watching_host(parent: int, gone: Callable[[], None]) -> Iterator[None]:
        """As below; `gone` is called in a thread."""
        threading.Thread(target=_wait_on_windows, args=(parent, gone), name="watch-host", daemon=True).start()
        yield

else:

    @contextlib.contextmanager
    def watching_host(parent: int, gone: Callable[[], None]) -> Iterator[None]:
        """Call `gone`, on the loop or in a thread, when `parent` is no longer the parent of this process.

        `parent` is os.getppid() at the process's start. A parent of 1 is watched too: the host may be init of a
        container (ipykernel #233).
        """
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None
        with contextlib.ExitStack() as cleanup:

            def look() -> None:
                nonlocal timer
                if os.getppid() != parent:
                    gone()
                else:
                    timer = loop.call_later(_POLL_INTERVAL, look)

            def ended() -> None:
                loop.remove_reader(end)
                look()

            try:
                end = cleanup.enter_context(contextlib.closing(_end_of(parent)))
            except OSError:  # already ended, not permitted, or no such call in this kernel or sandbox
                look()
            else:
                if os.getppid() == parent:
                    loop.add_reader(end, ended)
                    cleanup.callback(loop.remove_reader, end)
                    timer = loop.call_later(_AFTER_START, _interrupt, parent, gone, cleanup)
                else:  # its pid may belong to another process by now
                    gone()
            try:
                yield
            finally:
                if timer is not None:
                    timer.cancel()

    if sys.platform == "linux":
        _PR_SET_PDEATHSIG = 1
        _PARENT_ENDED = signal.SIGUSR2

        def _interrupt(parent: int, gone: Callable[[], None], cleanup: contextlib.ExitStack) -> None:
            """Let the kernel interrupt the main thread at the parent's end, which a blocked loop would not notice."""
            import ctypes

            def look(*_signal: object) -> None:
                if os.getppid() != parent:  # the signal also comes when only a thread of the parent has ended
                    gone()

            prctl = ctypes.CDLL(None).prctl
            cleanup.callback(signal.signal, _PARENT_ENDED, signal.signal(_PARENT_ENDED, look))
            cleanup.callback(prctl, _PR_SET_PDEATHSIG, 0, 0, 0, 0)
            prctl(_PR_SET_PDEATHSIG, _PARENT_ENDED, 0, 0, 0)
            look()  # it may have ended before

        def _end_of(pid: int) -> FileIO:
            """What becomes readable when the process ends. Raises OSError."""
            return FileIO(os.pidfd_open(pid))

    else:

        def _interrupt(parent: int, gone: Callable[[], None], cleanup: contextlib.ExitStack) -> None:
            """Do nothing: macOS has no signal for a parent's end."""

        def _end_of(pid: int) -> select.kqueue:
            """What becomes readable when the process ends. Raises OSError."""
            queue = select.kqueue()
            try:
                queue.control([select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)], 0)
            except OSError:
                queue.close()
                raise
            return queue


class LastResort:
    """Kills the process when its shutdown hangs: a blocked loop, an executor's thread, a library's exit handler.

    The process then exits with `exit_code`, after `flush`, which must be bounded. On POSIX a signal interrupts the
    main thread: at the shutdown the system may refuse another thread (a full pids cgroup, `ulimit -v`). Created in
    the main thread.
    """

    def __init__(self, flush: Callable[[], None]) -> None:
        self.exit_code = 1
        self._flush = flush
        self._seconds = 0.0
        if sys.platform != "win32":
            signal.signal(signal.SIGALRM, lambda _number, _frame: self._kill())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])  # as the host may have left it
            # After the exit handlers Python takes its handlers back, and the signal would end the process itself.
            atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)

    def arm(self, seconds: float) -> None:
        """Kill the process in `seconds`. Only the first call counts. Called from any thread or a signal handler."""
        if self._seconds:
            return
        self._seconds = seconds
        if sys.platform == "win32":
            timer = threading.Timer(seconds, self._kill)
            timer.daemon = True
            timer.start()
        else:
            # Again and again: a signal just before the main thread begins to wait does not end that wait.
            signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)

    def _kill(self) -> None:
        if self.exit_code:
            _log.error("the plugin did not exit within %.1f s and is killed", self._seconds)
        self._flush()
        os._exit(self.exit_code)
