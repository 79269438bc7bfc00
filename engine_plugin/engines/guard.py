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
    parent = os.environ.pop(PARENT_VARIABLE, None)  # meant for us, not for what we spawn
    if parent is not None and os.getppid() != int(parent):
        os._exit(0)


def _stay(command: list[str]) -> int:
    """Run `command` as a child, pass SIGTERM on, and end it when stdin closes. Returns its exit status, or ends as
    it ended by a signal."""
    child: subprocess.Popen[bytes] | None = None
    asked = False

    def pass_on(_number: int, _frame: object) -> None:
        nonlocal asked
        asked = True
        if child is not None:
            child.terminate()

    def watch_stdin(child: subprocess.Popen[bytes]) -> None:
        while os.read(0, 4096):
            pass
        _end(child)

    signal.signal(signal.SIGTERM, pass_on)  # before there is a child, or the signal could leave it an orphan
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    if asked:
        child.terminate()
    threading.Thread(target=watch_stdin, args=(child,), daemon=True).start()
    status = child.wait()
    if status < 0:
        _die_of(-status)
    return status


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_STOP_WAIT)
    except subprocess.TimeoutExpired:
        child.kill()


def _die_of(number: int) -> None:
    """End by the signal that ended the child, so that the plugin can name it; the core dump was the child's."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # SIGKILL has no handler to set
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _exec(command: list[str]) -> None:
    """Become the command, with the signals at their defaults that Python ignores."""
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.execvp(command[0], command)


def main(command: list[str]) -> int:
    """Become or run `command`; does not return where it can be exec'd."""
    if not command:
        sys.stderr.write("usage: python -m engine_plugin.engines.guard COMMAND…\n")
        return 2
    try:
        if sys.platform == "linux":
            arm()
            _exec(command)
        return _stay(command)
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error.strerror}\n")
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
