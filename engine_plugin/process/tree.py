"""Process trees, per operating system: how to spawn an engine apart from us, end its tree, and know it again."""

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
    from collections.abc import Iterable

__all__ = [
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
    "spawn_options",
    "start_time",
]

_CREATE_SUSPENDED = 0x4  # of CreateProcess; the subprocess module has no name for it
if sys.platform == "linux":
    _TICKS = os.sysconf("SC_CLK_TCK")


def spawn_options(*, held: bool = False) -> dict[str, Any]:
    """Arguments for subprocess creation: a session (or process group) of its own, no inherited handles.

    With `held` the process does nothing, on Windows, until `bind_to_us` has it in a job: what it spawned before
    that would not be in the job.
    """
    if sys.platform == "win32":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
        return {"creationflags": flags | (_CREATE_SUSPENDED if held else 0)}
    return {"start_new_session": True, "close_fds": True}


def ask_to_stop(pid: int) -> None:
    """The polite signal: SIGTERM, or CTRL_BREAK to the process group on Windows. A process gone is fine."""
    with contextlib.suppress(OSError):  # on Windows the event also fails between two consoles
        if sys.platform == "win32":
            # Not os.kill, which ends the process at once when it has a console of its own.
            ctypes.windll.kernel32.GenerateConsoleCtrlEvent(signal.CTRL_BREAK_EVENT, pid)
        else:
            os.kill(pid, signal.SIGTERM)


def pids() -> list[int]:
    """The processes of this machine; none where the system shows none, as Linux does without /proc."""
    try:
        return psutil.pids()
    except IndexError:  # what psutil raises then
        return []


def descendants(pid: int) -> list[psutil.Process]:
    """The process's children, their children, and so on, wherever they have put themselves."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def memory(pid: int) -> int:
    """The bytes of memory that a process and its descendants have in use, files mapped into it among them."""
    used = 0
    with contextlib.suppress(psutil.Error):
        for process in [psutil.Process(pid), *descendants(pid)]:
            with contextlib.suppress(psutil.Error):
                used += process.memory_info().rss
    return used


def session_members(pid: int) -> list[psutil.Process]:
    """Every process in the session that `pid` leads or led; none on Windows.

    While a session has members, the kernel gives its leader's number to nobody else. So where a process with that
    number turns up after the leader's end, no member is left.
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

    `leader_gone` says that the process has been waited for, so that its number may be another's by now. Returns
    those that were alive: call it again, with them, until it returns none.
    """
    victims = {process.pid: process for process in known}
    if not (leader_gone and psutil.pid_exists(pid)):
        own = [] if leader_gone else descendants(pid)
        with contextlib.suppress(psutil.Error):
            own.append(psutil.Process(pid))
        victims |= {process.pid: process for process in [*own, *session_members(pid)]}
        if sys.platform != "win32" and victims:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)  # at one blow, so that none can fork meanwhile
    return kill(victims.values())


def kill(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Kill these very processes. Returns those that were alive: call it again, with them, until it returns none."""
    left = [process for process in processes if is_alive(process)]
    for process in left:
        with contextlib.suppress(psutil.Error):  # psutil compares start times: a reused pid is never hit
            process.kill()
    return left


def is_alive(process: psutil.Process) -> bool:
    """Whether this very process runs; one that only waits to be reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def start_time(pid: int) -> float | None:
    """When the process was created, None when there is no such process. In seconds, on Linux since the boot.

    The time of day would not do there: it is computed from that of the boot, which moves when the clock is set, and
    then no process would be known again.
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
    total = 0.0
    with contextlib.suppress(psutil.Error):
        for process in [psutil.Process(pid), *descendants(pid)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def same_process(pid: int, created: float) -> bool:
    """Whether the pid still belongs to the process that was created then."""
    now = start_time(pid)
    return now is not None and abs(now - created) < 0.05


def bind_to_us(pid: int) -> Any:
    """On Windows, put the process into a Job Object that dies with the returned handle's owner: us; then let it run.

    Elsewhere None: `guard` does it from the inside. Keep the returned object as long as the process may live.
    Raises OSError, and then a process that was held has to be killed.
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
