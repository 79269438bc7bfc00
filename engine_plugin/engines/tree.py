"""Process trees, per operating system: how to spawn an engine apart from us, end its tree, and know it again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import Any

import psutil

__all__ = [
    "ask_to_stop",
    "bind_to_us",
    "kill_tree",
    "processor_seconds",
    "same_process",
    "spawn_options",
    "start_time",
]


def spawn_options() -> dict[str, Any]:
    """Arguments for subprocess creation: a session (or process group) of its own, no inherited handles."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True, "close_fds": True}


def ask_to_stop(pid: int) -> None:
    """The polite signal: SIGTERM, or CTRL_BREAK to the process group on Windows. A process gone is fine."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            os.kill(pid, signal.CTRL_BREAK_EVENT)
        else:
            os.kill(pid, signal.SIGTERM)


def kill_tree(pid: int) -> None:
    """Kill a process that leads its own session, everything in that group, and all its descendants."""
    victims: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        victims = psutil.Process(pid).children(recursive=True)
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    else:
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).kill()
    for victim in victims:
        with contextlib.suppress(psutil.Error):  # psutil compares start times: a reused pid is never hit
            victim.kill()


def start_time(pid: int) -> float | None:
    """When the process was created (seconds since the epoch), None when there is no such process."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def processor_seconds(pid: int) -> float:
    """How much processor time the process has used; 0 when there is no such process."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def same_process(pid: int, created: float) -> bool:
    """Whether the pid still belongs to the process that was created then."""
    now = start_time(pid)
    return now is not None and abs(now - created) < 0.05


def bind_to_us(pid: int) -> Any:
    """On Windows, put the process into a Job Object that dies with the returned handle's owner: us.

    Elsewhere None: `guard` does it from the inside. Keep the returned object as long as the process may live.
    """
    if sys.platform == "win32":
        from engine_plugin.engines.job_windows import KillOnCloseJob

        return KillOnCloseJob(pid)
    return None
