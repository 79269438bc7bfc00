"""Process trees: every process of one is found and ended, and no other."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from engine_plugin.process import python, tree
from tests.patience import LIMIT, until
from tests.process.conftest import CHILD, Spawner, alive, running

if TYPE_CHECKING:
    from collections.abc import Iterator

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX sessions")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux's own way")
STUBBORN = [*CHILD, "ignore-term", "ignore-stdin"]


@pytest.fixture
def leader(spawner: Spawner) -> Iterator[subprocess.Popen[bytes]]:
    """A process as the plugin spawns it, with a child in its session and one in a session of its own."""
    actions = [f"grandchild:{spawner.path('kin')}", f"loner:{spawner.path('loner')}", f"ready:{spawner.path('up')}"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*STUBBORN, *actions], env=spawner.env, stdin=pipe, **tree.SPAWN_OPTIONS) as process:
        try:
            yield process
        finally:
            process.kill()


async def is_up(spawner: Spawner) -> list[int]:
    """The pids of `leader`, its child, and the one elsewhere."""
    await until((spawner.folder / "up").exists, "all are up")
    return [spawner.pid(name) for name in ("up", "kin", "loner")]


@posix_only
@pytest.mark.promise("F5")
async def test_whole_process_tree_is_killed(spawner: Spawner, leader: subprocess.Popen[bytes]) -> None:
    pids = await is_up(spawner)
    assert {process.pid for process in tree.descendants(leader.pid)} == set(pids[1:])
    assert {process.pid for process in tree.session_members(leader.pid)} == set(pids[:2])
    left = tree.kill_tree(leader.pid)
    assert {process.pid for process in left} <= set(pids), "some may have died at once"
    await until(lambda: not tree.kill_tree(leader.pid, left), "all are gone")
    assert not any(alive(pid) for pid in pids)


@posix_only
@pytest.mark.promise("F5")
async def test_descendants_of_a_dead_leader_are_killed(spawner: Spawner, leader: subprocess.Popen[bytes]) -> None:
    """Its session is found by its number, processes that left it only if they were found before."""
    pids = await is_up(spawner)
    kin = tree.descendants(leader.pid)
    leader.kill()
    await asyncio.to_thread(leader.wait, LIMIT)
    left = tree.kill_tree(leader.pid, leader_gone=True)
    assert {process.pid for process in left} <= {pids[1]}, "it may have died at once"
    await until(lambda: not alive(pids[1]), "it is gone")
    assert alive(pids[2])
    await until(lambda: not tree.kill_tree(leader.pid, kin, leader_gone=True), "all are gone")


@posix_only
@pytest.mark.promise("F11")
async def test_process_with_a_reused_pid_is_not_killed(spawner: Spawner, leader: subprocess.Popen[bytes]) -> None:
    """A reaped process had this pid; now another process has it, with its own session."""
    pids = await is_up(spawner)
    assert tree.kill_tree(leader.pid, leader_gone=True) == []
    stale = psutil.Process(leader.pid)
    vars(stale)["_ident"] = (leader.pid, 12345.0)  # of a process that had this number long ago
    assert tree.kill([stale]) == []
    assert all(alive(pid) for pid in pids)
    kin = tree.descendants(leader.pid)
    await until(lambda: not tree.kill_tree(leader.pid, kin), "all are gone")


async def test_zombie_is_not_alive(spawner: Spawner) -> None:
    with running(spawner, [*CHILD, "exit:0"]) as process:
        watched = psutil.Process(process.pid)
        await until(lambda: not alive(process.pid), "it has ended")
        assert not tree.is_alive(watched)
        if sys.platform != "win32":
            assert tree.start_time(process.pid) is None
        assert tree.kill([watched]) == []
        process.wait(LIMIT)
        assert not tree.is_alive(watched)
        assert tree.start_time(process.pid) is None
        assert tree.processor_seconds(process.pid) == 0
        assert tree.descendants(process.pid) == []


async def test_start_times_distinguish_processes(spawner: Spawner) -> None:
    mine = tree.start_time(os.getpid())
    assert mine is not None
    assert mine == tree.start_time(os.getpid())
    assert tree.same_process(os.getpid(), mine)
    assert not tree.same_process(os.getpid(), mine + 1)
    with running(spawner, [*CHILD, f"ready:{spawner.path('up')}"]) as process:
        await until((spawner.folder / "up").exists, "it is up")
        theirs = tree.start_time(process.pid)
        assert theirs is not None
        assert theirs > mine


@linux_only
async def test_process_name_with_spaces_does_not_change_the_start_time(spawner: Spawner) -> None:
    """The kernel writes the unescaped process name before the times."""
    named = spawner.folder / "a) S 1 (b"
    named.symlink_to("/bin/sleep")
    with running(spawner, [str(named), "50"]) as process:
        created = tree.start_time(process.pid)
        assert created is not None
        booted_ago = psutil.Process(process.pid).create_time() - psutil.boot_time()
        assert created == pytest.approx(booted_ago, abs=0.02)


@posix_only
async def test_processor_time_below_the_guard_is_counted(spawner: Spawner) -> None:
    """The processor time of any descendant shows that a model loads."""
    with running(spawner, [*python.guarded(CHILD), "burn:1000", "ignore-stdin"]) as process:
        await until(lambda: tree.processor_seconds(process.pid) > 0.2, "it computes")
        tree.ask_to_stop(process.pid)
        await asyncio.to_thread(process.wait, LIMIT)


@posix_only
@pytest.mark.promise("F17")
@pytest.mark.parametrize("guarded", [False, True])
async def test_stop_request_sends_sigterm(spawner: Spawner, guarded: bool) -> None:
    command = [*CHILD, f"ready:{spawner.path('up')}", "ignore-stdin"]
    with running(spawner, python.guarded(command) if guarded else command) as process:
        await until((spawner.folder / "up").exists, "it is up")
        tree.ask_to_stop(process.pid)
        assert await asyncio.to_thread(process.wait, LIMIT) == -signal.SIGTERM
    tree.ask_to_stop(process.pid)  # gone is fine


@pytest.mark.skipif(sys.platform == "win32", reason="there it is a Job Object")
def test_no_job_is_used_where_the_guard_binds() -> None:
    assert tree.bind_to_us(os.getpid()) is None
    assert tree.SPAWN_OPTIONS == {"start_new_session": True}


@pytest.mark.promise("L11")
def test_stop_request_on_windows_is_a_console_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """os.kill ends a process that has a console of its own, where the event cannot be sent."""
    sent: list[tuple[int, int]] = []

    class Kernel:
        def GenerateConsoleCtrlEvent(self, event: int, group: int) -> int:  # noqa: N802  # Windows' name
            sent.append((event, group))
            return 0  # it could not be sent

    class Dlls:
        kernel32 = Kernel()

    def kill(*_arguments: int) -> None:
        raise AssertionError("os.kill")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(signal, "CTRL_BREAK_EVENT", 1, raising=False)
    monkeypatch.setattr(ctypes, "windll", Dlls, raising=False)
    monkeypatch.setattr(os, "kill", kill)
    tree.ask_to_stop(4711)
    assert sent == [(1, 4711)]


@pytest.mark.promise("L7")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows shows its processes in another way")
def test_system_that_lists_no_processes_is_tolerated(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_to_see() -> list[int]:
        raise IndexError("list index out of range")  # psutil's word for an empty /proc

    monkeypatch.setattr(psutil, "pids", none_to_see)
    assert tree.pids() == []
    assert tree.session_members(os.getpid()) == []
