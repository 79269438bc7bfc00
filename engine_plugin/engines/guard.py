"""Keeps a process from outliving its parent. Runs inside engine processes, so it imports only the stdlib.

`arm()` is for processes of ours. `python -m engine_plugin.engines.guard COMMAND…` is for a foreign program: on
Linux it arms itself and becomes the program by exec, so that nothing of ours stays in between; on other POSIX
systems it stays as the program's parent and ends it when stdin, held by the plugin, is closed. (Windows needs
neither: the plugin puts the process into a Job Object.)

The kernel's parent-death signal belongs to the thread that spawned us and is lost when the parent dies first,
hence the second look at getppid() after arming.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

__all__ = ["PARENT_VARIABLE", "arm", "main"]

PARENT_VARIABLE = "ENGINE_PLUGIN_PARENT"
"""The pid that must be our parent, set by the spawner."""

_PR_SET_PDEATHSIG = 1
_STOP_WAIT = 3.0


def arm() -> None:
    """Ask the kernel to kill this process when its parent dies; exit at once if that has happened already."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is not None and os.getppid() != int(parent):
        os._exit(0)


def _stay(command: list[str]) -> int:
    """Run `command` as a child, pass SIGTERM on, and end it when stdin closes. Returns its exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end_child() -> None:
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
            try:
                child.wait(_STOP_WAIT)
            except subprocess.TimeoutExpired:
                child.kill()

    def watch_stdin() -> None:
        while os.read(0, 4096):
            pass
        end_child()

    signal.signal(signal.SIGTERM, lambda _number, _frame: child.terminate())
    threading.Thread(target=watch_stdin, daemon=True).start()
    return child.wait()


def main(command: list[str]) -> int:
    """Become or run `command`; does not return where it can be exec'd."""
    if not command:
        sys.stderr.write("usage: python -m engine_plugin.engines.guard COMMAND…\n")
        return 2
    try:
        if sys.platform == "linux":
            arm()
            os.execvp(command[0], command)
        return _stay(command)
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error.strerror}\n")
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
