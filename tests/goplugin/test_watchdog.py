from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from engine_plugin.goplugin import watchdog
from engine_plugin.goplugin.watchdog import wait_until_host_gone, watch_host
from tests.goplugin.hosting import ROOT, environ
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

# Its child watches it; the child writes to the pipe that both inherit, and the pipe ends with both.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
child.wait()
"""
CHILD = """
import os, sys
from engine_plugin.goplugin import watchdog
parent = os.getppid()
{before}
print("watching", flush=True)
watchdog.wait_until_host_gone(parent)
print("gone", os.getppid() != parent, flush=True)
"""
WITHOUT_PIDFD = """
def refuse(pid):
    raise OSError("no such call")
os.pidfd_open = refuse
"""


@pytest.fixture
def parent(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PARENT, CHILD.format(before=request.param)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ(), cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.promise("G36")
@pytest.mark.parametrize("parent", ["", WITHOUT_PIDFD], indirect=True, ids=["pidfd", "polling"])
def test_death_of_the_parent_is_detected(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    assert parent.stdout.readline() == "watching\n"
    parent.kill()
    assert parent.stdout.read() == "gone True\n"


@pytest.mark.promise("G36")
def test_parent_that_died_before_the_watch_is_detected() -> None:
    """Between reading the parent's pid and watching it, it may die and its pid be reused."""
    gone = threading.Event()
    sleeper = subprocess.Popen([sys.executable, "-c", ""])
    sleeper.wait(LIMIT)
    watch_host(sleeper.pid, gone.set)
    assert gone.wait(LIMIT)


@pytest.mark.promise("G36")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no change of parent")
def test_reused_pid_of_the_parent_is_detected() -> None:
    """The pid now belongs to another process."""
    gone = threading.Event()
    watch_host(os.getpid(), gone.set)
    assert gone.wait(LIMIT)


@pytest.mark.promise("G36", "F4")
@pytest.mark.skipif(sys.platform == "win32", reason="init is a matter of POSIX")
def test_parent_with_pid_1_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host may be a container's init."""
    polls = 0

    def sleep(_seconds: float) -> None:
        nonlocal polls
        polls += 1
        if polls == 3:
            monkeypatch.setattr(os, "getppid", lambda: 0)

    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(watchdog, "_wait_for_pidfd", lambda _parent: None, raising=False)
    monkeypatch.setattr(time, "sleep", sleep)
    wait_until_host_gone(1)
    assert polls == 3


@pytest.mark.promise("G34")
@pytest.mark.parametrize("code", [0, 1])
def test_stuck_process_is_killed_after_the_limit(code: int) -> None:
    program = f"""
import time
from engine_plugin.goplugin.watchdog import LastResort
last_resort = LastResort(flush=lambda: print("flushed", flush=True))
last_resort.exit_code = {code}
last_resort.arm(0.2)
last_resort.arm(0.0)
started = time.monotonic()
while time.monotonic() - started < 0.1:
    pass
print("still here", flush=True)
time.sleep(1000)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environ(), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
    )
    assert (ended.returncode, ended.stdout) == (code, "still here\nflushed\n")
    assert ("did not exit within 0.2 s" in ended.stderr) == bool(code)
