from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from engine_plugin.goplugin import watchdog
from engine_plugin.goplugin.watchdog import watching_host
from tests.goplugin.hosting import ROOT, environ
from tests.patience import LIMIT, within

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO

# Its child watches it; the child writes to the pipe that both inherit, and the pipe ends with both.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
child.wait()
"""
CHILD = """
import asyncio, os
from engine_plugin.goplugin.watchdog import watching_host
parent = os.getppid()
{before}
async def watch():
    gone = asyncio.Event()
    with watching_host(parent, gone.set):
        print("watching", flush=True)
        await gone.wait()
asyncio.run(watch())
print("gone", os.getppid() != parent, flush=True)
"""
WITHOUT_PIDFD = """
def refuse(pid):
    raise OSError("no such call")
os.pidfd_open = refuse
"""


@pytest.fixture
def parent(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PARENT, request.param]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ(), cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.promise("G36")
@pytest.mark.parametrize(
    "parent", [CHILD.format(before=""), CHILD.format(before=WITHOUT_PIDFD)], indirect=True, ids=["pidfd", "polling"]
)
def test_death_of_the_parent_is_detected(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    assert parent.stdout.readline() == "watching\n"
    parent.kill()
    assert parent.stdout.read() == "gone True\n"


BLOCKED = """
import asyncio, os, signal, time
from engine_plugin.goplugin.watchdog import watching_host
parent = os.getppid()
def gone():
    print("gone", os.getppid() != parent, flush=True)
    os._exit(0)
async def block():
    with watching_host(parent, gone):
        while signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL:
            await asyncio.sleep(0.01)
        print("watching", flush=True)
        time.sleep(1000)
asyncio.run(block())
"""


@pytest.mark.promise("G36")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a signal for the end of a parent")
@pytest.mark.parametrize("parent", [BLOCKED], indirect=True, ids=[""])
def test_death_of_the_parent_interrupts_a_blocked_loop(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    assert parent.stdout.readline() == "watching\n"
    parent.kill()
    assert parent.stdout.read() == "gone True\n"


async def until_gone(parent: int) -> None:
    """Return when the watchdog reports the end of `parent`."""
    gone = threading.Event()
    with watching_host(parent, gone.set):
        assert await asyncio.to_thread(gone.wait, LIMIT)


@pytest.mark.promise("G36")
async def test_parent_that_died_before_the_watch_is_detected() -> None:
    """Between reading the parent's pid and watching it, it may die and its pid be reused."""
    sleeper = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await within(sleeper.wait())
    await until_gone(sleeper.pid)


@pytest.mark.promise("G36")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no change of parent")
async def test_reused_pid_of_the_parent_is_detected() -> None:
    """The pid now belongs to another process."""
    await until_gone(os.getpid())


@pytest.mark.promise("G36", "F4")
@pytest.mark.skipif(sys.platform == "win32", reason="init is a matter of POSIX")
async def test_parent_with_pid_1_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host may be a container's init."""
    looks = iter([1, 1, 1, 0])

    def refuse(_pid: int) -> FileIO:
        raise OSError("no such call")

    monkeypatch.setattr(os, "getppid", lambda: next(looks))
    monkeypatch.setattr(watchdog, "_end_of", refuse, raising=False)
    monkeypatch.setattr(watchdog, "_POLL_INTERVAL", 0)
    await until_gone(1)
    assert list(looks) == []


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


@pytest.mark.promise("G35")
def test_slow_end_of_the_interpreter_does_not_change_the_exit_status() -> None:
    """The limit passes after the exit handlers, when Python has no signal handlers any more."""
    program = """
import threading, time
from engine_plugin.goplugin.watchdog import LastResort
last_resort = LastResort(flush=lambda: None)
last_resort.exit_code = 0
class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)
kept = Slow()
last_resort.arm(0.2)
"""
    ended = subprocess.run([sys.executable, "-c", program], env=environ(), cwd=ROOT, timeout=LIMIT)
    assert ended.returncode == 0
