"""Keeps a process from outliving its parent. Runs inside engine processes, so it imports only the stdlib.

`arm()` is for programs of this project. For a foreign program `python guard.py COMMAND…` (`python.guarded`) stays as
its parent, a small supervisor without threads:

- it notices that the plugin has died (on Linux by the kernel's parent-death signal, everywhere by the end of stdin,
  which the plugin holds open) and confirms it by getppid();
- then, and when the program ends by itself, it kills all that is left of the program's tree. On Linux it is the
  "child subreaper" of the tree: each process that loses its parent becomes the guard's child, in any session, and the
  guard ends when it has no child left. On other POSIX systems it kills the program's process group;
- it passes SIGTERM and SIGINT on and ends as the program ended, by its status or its signal.

Windows needs no guard: the plugin puts the process into a Job Object.
"""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["PARENT_VARIABLE", "arm", "main"]

PARENT_VARIABLE = "ENGINE_PLUGIN_PARENT"
"""The variable with the pid of the spawner, which must be the parent."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_GLANCE = 0.05  # seconds between two looks at the parent while stdin cannot tell
_ROUND = 0.01  # seconds for the killed to end before they are looked for again


def arm() -> None:
    """Ask the kernel to kill this process when its parent dies; exit at once if that has happened already."""
    if sys.platform == "linux":
        parent = _parent()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def _parent() -> int:
    """The pid of the spawner. The variable is removed, so that child processes do not inherit it."""
    return int(os.environ.pop(PARENT_VARIABLE, None) or os.getppid())


def _prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def main(command: list[str]) -> int:
    """Run `command` and return its exit status, or end by the signal that ended it."""
    if sys.platform == "win32" or not command:
        sys.stderr.write("usage: python guard.py COMMAND… (not on Windows, where a Job Object replaces the guard)\n")
        return 2
    else:  # noqa: RET505  # or type checkers for Windows read on
        status = _Supervisor(command).run()
        if os.WIFSIGNALED(status):
            _die_of(os.WTERMSIG(status))
        return os.waitstatus_to_exitcode(status)


if sys.platform != "win32":
    import select

    _PARENT_MAY_BE_GONE = signal.SIGUSR1
    _PASSED_ON = (signal.SIGTERM, signal.SIGINT)
    # Linux signals the death of a parent; other systems do not where another process has inherited its pipe.
    _BETWEEN_LOOKS = None if sys.platform == "linux" else 1.0
    _OURS = (signal.SIGCHLD, _PARENT_MAY_BE_GONE, *_PASSED_ON)

    class _Supervisor:
        """One program, watched from its start to the end of all that it spawned."""

        def __init__(self, command: list[str]) -> None:
            self._command = command
            self._parent = _parent()
            self._program = 0
            self._status: int | None = None

        def run(self) -> int:
            """The program's wait status. Without a parent at the start, the program does not run: 0."""
            signals = self._hear_signals()
            if sys.platform == "linux":
                _prctl(_PR_SET_PDEATHSIG, _PARENT_MAY_BE_GONE)
                _prctl(_PR_SET_CHILD_SUBREAPER, 1)
            if self._orphaned():  # the kernel sends nothing for a parent that was gone before we asked
                return 0
            self._spawn()
            self._watch(signals)
            self._end_all(signals)
            return signal.SIGKILL if self._status is None else self._status

        def _orphaned(self) -> bool:
            """Whether the plugin is gone. (The parent-death signal alone also comes when one thread of it ends.)"""
            return os.getppid() != self._parent

        def _hear_signals(self) -> int:
            """Have each signal arrive as a byte in the returned pipe, where none is lost."""
            receive, send = os.pipe()
            os.set_blocking(send, False)
            signal.set_wakeup_fd(send, warn_on_full_buffer=False)
            for number in _OURS:
                signal.signal(number, lambda _number, _frame: None)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)  # the spawner's thread may have blocked some
            return receive

        def _spawn(self) -> None:
            """Start the program by fork and exec.

            The parent-death signal of the program must be set in the program's process, before its exec, and
            getppid() checked afterwards. That is code between fork and exec, which is safe here: this process has one
            thread and no library but Python's. In the plugin itself, with gRPC's threads, the same (`preexec_fn`)
            could hang for ever.
            """
            guard = os.getpid()
            # Until the new process has its own handlers, the guard's handlers would swallow its signals.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            self._program = os.fork()
            if self._program:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                return
            try:
                signal.set_wakeup_fd(-1)
                for number in (*_OURS, signal.SIGPIPE, signal.SIGXFSZ):
                    signal.signal(number, signal.SIG_DFL)  # the last two are ignored by Python
                if sys.platform == "linux":
                    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # if it is the guard that is killed
                else:
                    os.setpgid(0, 0)
                if os.getppid() == guard:
                    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # stdin is the guard's
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
                    os.execvp(self._command[0], self._command)
            except OSError as error:
                sys.stderr.write(f"cannot run {self._command[0]}: {error.strerror}\n")
                sys.stderr.flush()
            finally:
                os._exit(127)

        def _watch(self, signals: int) -> None:
            """Return when the program has ended or the plugin is gone."""
            sources = [signals, 0] if _is_open(0) else [signals]
            while self._status is None and not self._orphaned():
                # An engine's stdin is open as long as the plugin lives. A helper's is not, hence the quick looks.
                quick = 0 not in sources
                ready, _, _ = select.select(sources, [], [], _GLANCE if quick else _BETWEEN_LOOKS)
                if 0 in ready and not _read(0):
                    sources.remove(0)
                if signals in ready:
                    for number in _read(signals):
                        if number in _PASSED_ON:
                            os.kill(self._program, number)  # not waited for yet, so the number is still its own
                self._wait_for_ended()

        def _wait_for_ended(self) -> bool:
            """Wait for every child that has ended, the program and adopted ones. False when there is no child."""
            try:
                while True:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if not pid:
                        return True
                    if pid == self._program:
                        self._status = status
            except ChildProcessError:
                return False

        def _end_all(self, signals: int) -> None:
            """Kill the program and what is left of its offspring, until it is gone."""
            if sys.platform != "linux":
                _kill(-self._program)
            pause = _ROUND
            while self._wait_for_ended():
                # A process of another user cannot be killed; waiting for it would hide the program's end.
                if not [pid for pid in self._offspring() if _kill(pid)]:
                    return
                if select.select([signals], [], [], pause)[0]:
                    _read(signals)
                pause = min(pause * 1.5, 1.0)

        def _offspring(self) -> list[int]:
            """The descendants that are alive; elsewhere than on Linux, only the program."""
            children: dict[int, list[int]] = {}
            if sys.platform == "linux":
                for name in os.listdir("/proc"):  # noqa: PTH208  # pathlib would double the guard's memory
                    if name.isdigit():
                        state, parent = _state_and_parent(name)
                        if state not in ("", "Z", "X"):
                            children.setdefault(parent, []).append(int(name))
            elif self._status is None:
                return [self._program]
            found = children.get(os.getpid(), [])
            for pid in found:  # grows meanwhile
                found += children.get(pid, [])
            return found

    def _state_and_parent(pid: str) -> tuple[str, int]:
        """Of a process on Linux; ("", 0) when it has just gone."""
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123  # as above
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            return "", 0
        return state.decode(), int(parent)

    def _is_open(descriptor: int) -> bool:
        try:
            os.fstat(descriptor)
        except OSError:
            return False
        return True

    def _read(descriptor: int) -> bytes:
        """What is there; nothing at the end, or where it cannot be read."""
        try:
            return os.read(descriptor, 4096)
        except OSError:
            return b""

    def _kill(pid: int) -> bool:
        """Whether it could be killed, as a zombie can."""
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            return False
        return True

    def _die_of(number: int) -> None:
        """End by the signal that ended the program, so that the plugin can name it; its core dump is enough."""
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # without Python's own end, which would cost as much as its start
