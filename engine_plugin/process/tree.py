"""Process trees, per operating system: spawn a process in its own session, end its tree, and recognise it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "SPAWN_OPTIONS",
    "ask_to_stop",
    "bind_to_us",
    "descendants",
    "is_alive",
    "kill",
    "kill_tree",
    "memory",
    "pids",
    "processor_seconds",
    "same_process",
    "session_members",
    "start_time",
]

SPAWN_OPTIONS: dict[str, Any] = {"start_new_session": True}
"""Arguments for subprocess creation: a session (or process group) of its own.

On Windows the process is suspended until `bind_to_us` has put it into a job: its earlier children would not be in it.
"""

if sys.platform == "win32":
    _CREATE_SUSPENDED = 0x4  # of CreateProcess; the subprocess module has no name for it
    SPAWN_OPTIONS = {
        "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW | _CREATE_SUSPENDED
    }
if sys.platform == "linux":
    _TICKS = os.sysconf("SC_CLK_TCK")


def ask_to_stop(pid: int) -> None:
    """Send SIGTERM, or CTRL_BREAK to the process group on Windows. Nothing when the process has ended."""
    with contextlib.suppress(OSError):  # on Windows the event also fails between two consoles
        if sys.platform == "win32":
            # Not os.kill, which ends the process at once when it has a console of its own.
            ctypes.windll.kernel32.GenerateConsoleCtrlEvent(signal.CTRL_BREAK_EVENT, pid)
        else:
            os.kill(pid, signal.SIGTERM)


def pids() -> list[int]:
    """The pids of this machine; empty where the system shows none, as Linux without /proc."""
    try:
        return psutil.pids()
    except IndexError:  # what psutil raises then
        return []


def descendants(pid: int) -> list[psutil.Process]:
    """The process's children, their children, and so on, in any session."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def memory(pid: int) -> int:
    """The bytes of memory that a process and its descendants have in use, files mapped into it among them."""
    return int(_total(pid, lambda process: process.memory_info().rss))


def session_members(pid: int) -> list[psutil.Process]:
    """Every process in the session that `pid` leads or led; none on Windows.

    While a session has members, the kernel does not reuse its leader's pid. So if a process with that pid appears
    after the leader's end, no member is left.
    """
    found: list[psutil.Process] = []
    if sys.platform != "win32":
        for other in pids():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(other) == pid:
                    found.append(psutil.Process(other))
    return found


def kill_tree(pid: int, known: Iterable[psutil.Process] = (), *, leader_gone: bool = False) -> list[psutil.Process]:
    """Kill a process that leads its own session, all its descendants, everything in that session, and `known`.

    `leader_gone` means that the process has been waited for, so that its pid may have been reused. Returns those that
    were alive: call it again, with them, until it returns none.
    """
    victims = {process.pid: process for process in known}
    if not (leader_gone and psutil.pid_exists(pid)):
        own = [] if leader_gone else descendants(pid)
        with contextlib.suppress(psutil.Error):
            own.append(psutil.Process(pid))
        victims |= {process.pid: process for process in [*own, *session_members(pid)]}
        if sys.platform != "win32" and victims:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)  # all at once, so that none can fork meanwhile
    return kill(victims.values())


def kill(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Kill these processes. Returns those that were alive: call it again, with them, until it returns none."""
    left = [process for process in processes if is_alive(process)]
    for process in left:
        with contextlib.suppress(psutil.Error):  # psutil compares start times: a reused pid is never hit
            process.kill()
    return left


def is_alive(process: psutil.Process) -> bool:
    """Whether this process runs, which a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def start_time(pid: int) -> float | None:
    """When the process was created, None when there is no such process. In seconds, on Linux since the boot.

    Not by the clock: it would change when the clock is set, and no process would be recognised then.
    """
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            return None if fields[0] in (b"Z", b"X") else int(fields[19]) / _TICKS
        except (OSError, ValueError, IndexError):
            return None
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def processor_seconds(pid: int) -> float:
    """How much processor time the process and its descendants have used; 0 when there is no such process."""
    return _total(pid, lambda process: sum(process.cpu_times()[:2]))


def _total(pid: int, figure: Callable[[psutil.Process], float]) -> float:
    total = 0.0
    with contextlib.suppress(psutil.Error):
        for process in [psutil.Process(pid), *descendants(pid)]:
            with contextlib.suppress(psutil.Error):
                total += figure(process)
    return total


def same_process(pid: int, created: float) -> bool:
    """Whether the pid still belongs to the process that was created then."""
    now = start_time(pid)
    return now is not None and abs(now - created) < 0.05


def bind_to_us(pid: int) -> Any:
    """On Windows, put the process into a Job Object that ends with this process, then let it run.

    Elsewhere None: the guard, or `guard.arm`, replaces it. Keep the returned object as long as the process may run.
    After an OSError the caller must kill a process that was held.
    """
    if sys.platform == "win32":
        from engine_plugin.process.job_windows import KillOnCloseJob

        job = KillOnCloseJob(pid)
        try:
            psutil.Process(pid).resume()  # without effect on one that was not held
        except psutil.Error as error:
            job.close()
            raise OSError(str(error)) from error
        return job
    return None
