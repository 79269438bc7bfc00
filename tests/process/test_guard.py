"""An engine and its descendants do not outlive their plugin, even one that is killed."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

import engine_plugin
from engine_plugin.process import guard, python
from engine_plugin.process.records import ProcessRecords
from tests.patience import LIMIT, NEVER, until, within
from tests.process.conftest import CHILD, Spawner, alive, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

GUARD = python.guarded([])
# Another POSIX system than Linux: no parent-death signal, no subreaper, no /proc.
AS_ELSEWHERE = (
    "import os, sys; sys.platform = 'darwin'; from engine_plugin.process import guard;"
    "os._exit(guard.main(sys.argv[1:]))"
)
ELSEWHERE = [sys.executable, "-c", AS_ELSEWHERE]
# What a plugin does: spawns argv[1:], says so in the environment, and lives until it is killed.
PLUGIN = """\
import os, subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], env=os.environ | {"ENGINE_PLUGIN_PARENT": str(os.getpid())}, stdin=-1)
time.sleep(1000 if os.environ["LIVES"] else 0)
os._exit(0)
"""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal and subreaper")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows uses a Job Object instead of the guard")
everywhere = pytest.mark.parametrize(
    "start", [pytest.param(GUARD, id="linux", marks=linux_only), pytest.param(ELSEWHERE, id="elsewhere")]
)


@pytest.fixture(autouse=True)
async def no_process_is_left(spawner: Spawner) -> AsyncIterator[None]:
    """A guard ends a moment after the last descendant of its program."""
    yield
    await until(lambda: spawner.left() == [], "the guards have ended")


def plugin_of(*argv: str) -> list[str]:
    return [sys.executable, "-c", PLUGIN, *argv]


# When the plugin is killed


@pytest.mark.promise("F7", "F8")
@everywhere
async def test_engine_ends_when_its_plugin_is_killed(spawner: Spawner, start: list[str]) -> None:
    argv = [*start, *CHILD, "ignore-term", "ignore-stdin", f"ready:{spawner.path('ready')}"]
    with running(spawner, plugin_of(*argv), LIVES="yes") as plugin:
        await until((spawner.folder / "ready").exists, "the engine is up")
        pid = spawner.pid("ready")
        assert alive(pid)
        plugin.kill()
        await until(lambda: not alive(pid), "the engine has ended")


@linux_only
@pytest.mark.promise("F5", "F7")
async def test_descendants_of_the_engine_end_when_the_plugin_is_killed(spawner: Spawner) -> None:
    """In the engine's session, in a session of its own, and one with an empty environment whose parent has ended."""
    script = (
        "import os, subprocess, sys; python, folder, child = sys.argv[1], sys.argv[2] + '/', sys.argv[3:];"
        "stubborn = ['ignore-term', 'ignore-stdin'];"
        'orphan = f\'import subprocess; subprocess.Popen({[*child, *stubborn, "ready:" + folder + "orphan"]},'
        " start_new_session=True, env=dict())';"
        "subprocess.run([python, '-c', orphan], check=True);"
        "actions = [f'grandchild:{folder}kin', f'loner:{folder}loner', f'ready:{folder}ready'];"
        "os.execv(python, [*child, *stubborn, *actions])"
    )
    engine = [sys.executable, "-c", script, sys.executable, str(spawner.folder), *CHILD]
    names = ("ready", "kin", "loner", "orphan")
    with running(spawner, plugin_of(*GUARD, *engine), LIVES="yes") as plugin:
        await until(lambda: all((spawner.folder / name).exists() for name in names), "all are up")
        pids = [spawner.pid(name) for name in names]
        guards = psutil.Process(plugin.pid).children()
        assert all(alive(pid) for pid in pids)
        plugin.kill()
        await until(lambda: not any(alive(pid) for pid in pids), "all have ended")
        await until(lambda: not any(alive(process.pid) for process in guards), "the guard has ended")


@pytest.mark.promise("F7")
async def test_process_group_is_killed_on_other_systems(spawner: Spawner) -> None:
    """A process that has left the group is found by the records."""
    argv = [
        *CHILD,
        "ignore-term",
        "ignore-stdin",
        f"grandchild:{spawner.path('kin')}",
        f"ready:{spawner.path('ready')}",
    ]
    with running(spawner, plugin_of(*ELSEWHERE, *argv), LIVES="yes") as plugin:
        await until((spawner.folder / "ready").exists, "all are up")
        pids = [spawner.pid("ready"), spawner.pid("kin")]
        plugin.kill()
        await until(lambda: not any(alive(pid) for pid in pids), "all have ended")


@pytest.mark.promise("F7")
async def test_death_of_the_plugin_is_detected_on_other_systems_though_stdin_stays_open(spawner: Spawner) -> None:
    """The end of stdin is the fastest sign of the plugin's death, not the only one."""
    plugin = (
        "import os, subprocess, sys, time\n"
        "receive, send = os.pipe()\n"
        "split = sys.argv.index('--')\n"
        "subprocess.Popen(sys.argv[1:split], stdin=-3, pass_fds=[send])\n"
        "env = os.environ | {'ENGINE_PLUGIN_PARENT': str(os.getpid())}\n"
        "subprocess.Popen(sys.argv[split + 1:], stdin=receive, env=env)\n"
        "time.sleep(1000)\n"
    )
    holder = [*CHILD, "ignore-stdin", f"ready:{spawner.path('holder')}"]
    engine = [*ELSEWHERE, *CHILD, "ignore-stdin", f"ready:{spawner.path('ready')}"]
    with running(spawner, [sys.executable, "-c", plugin, *holder, "--", *engine]) as process:
        await until((spawner.folder / "ready").exists, "the engine is up")
        await until((spawner.folder / "holder").exists, "the other is up")
        process.kill()
        await until(lambda: not alive(spawner.pid("ready")), "the engine has ended")
        assert alive(spawner.pid("holder"))
        os.kill(spawner.pid("holder"), signal.SIGKILL)


@linux_only
@pytest.mark.promise("F7", "F8")
async def test_process_bound_to_its_parent_ends_when_the_plugin_is_killed(spawner: Spawner) -> None:
    """After SIGKILL of the plugin only the kernel can react."""
    script = (
        "import os, sys, time; from engine_plugin.process import guard; guard.arm();"
        "open(sys.argv[1] + '.new', 'w').write(str(os.getpid())); os.replace(sys.argv[1] + '.new', sys.argv[1]);"
        "time.sleep(1000)"
    )
    with running(spawner, plugin_of(sys.executable, "-c", script, spawner.path("up")), LIVES="yes") as plugin:
        await until((spawner.folder / "up").exists, "the child is up")
        pid = spawner.pid("up")
        plugin.kill()
        await until(lambda: not alive(pid), "the child has ended")


@pytest.mark.promise("F8")
@pytest.mark.parametrize(
    ("way", "system"),
    [
        pytest.param("guard.main(sys.argv[2:])", "linux", marks=linux_only),
        pytest.param("guard.arm(); os.execvp(sys.argv[2], sys.argv[2:])", "linux", marks=linux_only),
        ("guard.main(sys.argv[2:])", "darwin"),  # no binding there: it reads the end of stdin
    ],
)
async def test_plugin_that_died_before_the_binding_is_detected(spawner: Spawner, way: str, system: str) -> None:
    """The kernel sends nothing for a parent that is gone already, hence the look at getppid()."""
    script = (
        "import os, sys, time\n"
        "from engine_plugin.process import guard\n"
        f"sys.platform = {system!r}\n"
        "open(sys.argv[1] + '/up.new', 'w').write(str(os.getpid()))\n"
        "os.replace(sys.argv[1] + '/up.new', sys.argv[1] + '/up')\n"
        "while not os.path.exists(sys.argv[1] + '/go'): time.sleep(0.005)\n"
        f"{way}\n"
    )
    argv = [sys.executable, "-c", script, str(spawner.folder), "touch", spawner.path("ran")]
    with running(spawner, plugin_of(*argv), LIVES="") as plugin:
        assert plugin.wait(LIMIT) == 0
        await until((spawner.folder / "up").exists, "the child is up")
        (spawner.folder / "go").touch()
        await until(lambda: not alive(spawner.pid("up")), "the child has ended")
    assert not (spawner.folder / "ran").exists()


@pytest.mark.promise("F8")
@everywhere
def test_program_with_another_parent_than_the_named_one_is_not_run(spawner: Spawner, start: list[str]) -> None:
    ran = spawner.folder / "ran"
    with running(spawner, [*start, "touch", str(ran)], ENGINE_PLUGIN_PARENT="1") as process:
        assert process.wait(LIMIT) == 0
    assert not ran.exists()
    with running(spawner, [*start, "touch", str(ran)], ENGINE_PLUGIN_PARENT=str(os.getpid())) as process:
        assert process.wait(LIMIT) == 0
    assert ran.exists()


@linux_only
@pytest.mark.promise("F8")
async def test_end_of_the_spawning_thread_is_not_taken_for_the_death_of_the_plugin(spawner: Spawner) -> None:
    """The kernel's signal is for a thread's death; a look at getppid() tells the difference, now and later."""
    plugin = (
        "import os, subprocess, sys, threading, time\n"
        "def spawn():\n"
        "    env = os.environ | {'ENGINE_PLUGIN_PARENT': str(os.getpid())}\n"
        "    subprocess.Popen(sys.argv[2:], env=env, stdin=-1)\n"
        "    while not os.path.exists(sys.argv[1]): time.sleep(0.005)\n"
        "thread = threading.Thread(target=spawn)\n"
        "thread.start()\n"
        "thread.join()\n"
        "print('ended', flush=True)\n"
        "time.sleep(1000)\n"
    )
    argv = [*GUARD, *CHILD, "ignore-stdin", f"ready:{spawner.path('ready')}"]
    with running(spawner, [sys.executable, "-c", plugin, spawner.path("ready"), *argv]) as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "ended\n"
        pid = spawner.pid("ready")
        with pytest.raises(psutil.TimeoutExpired):
            await asyncio.to_thread(psutil.Process(pid).wait, 0.3)
        process.kill()
        await until(lambda: not alive(pid), "the engine has ended")


@linux_only
@pytest.mark.promise("F7")
async def test_program_ends_when_its_guard_is_killed(spawner: Spawner) -> None:
    with running(
        spawner, [*GUARD, *CHILD, "ignore-term", "ignore-stdin", f"ready:{spawner.path('ready')}"]
    ) as process:
        await until((spawner.folder / "ready").exists, "the program is up")
        assert spawner.pid("ready") != process.pid
        process.kill()
        await until(lambda: not alive(spawner.pid("ready")), "the program has ended")


# In the hands of the plugin's process actor


@linux_only
@pytest.mark.promise("F5", "F17", "F20")
@pytest.mark.parametrize("ends", ["exit:7", "die:SIGSEGV"])
async def test_actor_reports_how_a_guarded_program_ended(spawner: Spawner, ends: str) -> None:
    actions = [
        f"loner:{spawner.path('loner')}",
        f"ready:{spawner.path('ready')}",
        f"until:{spawner.path('go')}",
        ends,
    ]
    process = spawner.engine(argv=python.guarded([*CHILD, *actions]))
    await within(process.ensure_ready())
    assert process.pid is not None
    assert process.pid != spawner.pid("ready")
    (spawner.folder / "go").touch()
    await within(process.ended.wait())
    assert ("exit code 7" if ends == "exit:7" else "SIGSEGV (exit code -11)") in process.failure
    assert not alive(spawner.pid("loner"))


@linux_only
@pytest.mark.promise("F5", "F17")
@pytest.mark.parametrize("obeys", [True, False])
async def test_actor_stops_a_guarded_program(spawner: Spawner, obeys: bool) -> None:
    actions = ["ignore-stdin", f"loner:{spawner.path('loner')}", f"ready:{spawner.path('ready')}"]
    command = [*CHILD, *actions] if obeys else [*CHILD, "ignore-term", *actions]
    process = spawner.engine(argv=python.guarded(command), stop_timeout=NEVER if obeys else 0.1)
    await within(process.ensure_ready())
    pids = [spawner.pid("ready"), spawner.pid("loner")]
    await within(process.stop())
    assert not any(alive(pid) for pid in pids)
    assert process.failure == ""


@linux_only
@pytest.mark.promise("F5", "F20")
async def test_actor_ends_the_descendants_of_a_killed_guard(spawner: Spawner) -> None:
    """The program ends with its guard; its descendants in other sessions are found by the token only."""
    ticket = ProcessRecords(spawner.folder / "run").ticket()
    ticket.token = spawner.token
    actions = ["ignore-stdin", f"loner:{spawner.path('loner')}", f"ready:{spawner.path('ready')}"]
    process = spawner.engine(argv=python.guarded([*CHILD, *actions]), stragglers=ticket.stragglers)
    await within(process.ensure_ready())
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    await within(process.ended.wait())
    assert "SIGKILL" in process.failure
    assert not alive(spawner.pid("loner"))


@pytest.mark.promise("F10")
def test_only_the_guard_forks() -> None:
    """In a process full of gRPC's threads a fork may hang for ever; everything is spawned."""
    package = Path(engine_plugin.__file__).parent
    forks = re.compile(r"\bos\.(fork|forkpty)\b|\bpty\.fork\b|preexec_fn=|\bmultiprocessing\b|\bos\.system\b")
    found = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if forks.search(path.read_text())]
    assert found == ["process/guard.py"]


# When the program ends


@everywhere
@pytest.mark.parametrize(
    ("action", "status"),
    [("exit:0", 0), ("exit:9", 9), ("die:SIGABRT", -6), ("die:SIGKILL", -9), ("die:SIGTERM", -15)],
)
def test_guard_ends_with_the_status_of_its_program(
    spawner: Spawner, start: list[str], action: str, status: int
) -> None:
    with running(spawner, [*start, *CHILD, action]) as process:
        assert process.wait(LIMIT) == status


@linux_only
@pytest.mark.promise("F5")
@pytest.mark.parametrize("ends", ["exit:3", "die:SIGSEGV"])
async def test_descendants_of_an_ended_program_end_before_the_guard(spawner: Spawner, ends: str) -> None:
    actions = [f"grandchild:{spawner.path('kin')}", f"loner:{spawner.path('loner')}", ends]
    with running(spawner, [*GUARD, *CHILD, *actions]) as process:
        assert await asyncio.to_thread(process.wait, LIMIT) == (3 if ends == "exit:3" else -signal.SIGSEGV)
        assert not alive(spawner.pid("kin"))
        assert not alive(spawner.pid("loner"))


@linux_only
async def test_unkillable_descendant_does_not_hide_the_end_of_the_program(spawner: Spawner) -> None:
    """An example is a process that has changed its user."""
    script = (
        "import os, sys; from engine_plugin.process import guard\n"
        "def refused(pid, signal): raise PermissionError\n"
        "os.kill = refused\n"
        "os._exit(guard.main(sys.argv[1:]))\n"
    )
    with running(
        spawner, [sys.executable, "-c", script, *CHILD, f"loner:{spawner.path('loner')}", "exit:3"]
    ) as process:
        assert await asyncio.to_thread(process.wait, LIMIT) == 3
        assert alive(spawner.pid("loner"))
        os.kill(spawner.pid("loner"), signal.SIGKILL)


@linux_only
async def test_orphaned_descendants_are_reaped_by_the_guard(spawner: Spawner) -> None:
    """The guard is their new parent; unreaped they would stay as zombies."""
    script = (
        "import os, sys, time\n"
        "for _ in range(5):\n"
        "    if not os.fork():\n"
        "        if not os.fork(): os._exit(0)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "open(sys.argv[1], 'w').close()\nwhile True: time.sleep(0.1)\n"
    )
    with running(spawner, [*GUARD, sys.executable, "-I", "-S", "-c", script, spawner.path("done")]) as process:
        await until((spawner.folder / "done").exists, "all have ended")
        watched = psutil.Process(process.pid)
        await until(lambda: len(watched.children()) == 1, "only the program is left")
        process.terminate()
        assert await asyncio.to_thread(process.wait, LIMIT) == -signal.SIGTERM


# Signals, and what else passes between the plugin and the program


@pytest.mark.promise("F17")
@everywhere
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_termination_signals_are_forwarded_to_the_program(
    spawner: Spawner, start: list[str], number: signal.Signals
) -> None:
    script = (
        f"import os, signal, sys, time; signal.signal({int(number)}, lambda *_: os._exit(5));"
        "open(sys.argv[1], 'w').close()\n"
        "while True: time.sleep(0.1)"  # a signal just before a long sleep would wait for its end
    )
    command = [sys.executable, "-I", "-S", "-c", script, spawner.path("ready")]
    with running(spawner, [*start, *command]) as process:
        await until((spawner.folder / "ready").exists, "the program is up")
        process.send_signal(number)
        assert await asyncio.to_thread(process.wait, LIMIT) == 5


@pytest.mark.promise("F17")
@everywhere
@pytest.mark.parametrize("moment", ["before", "after"])
async def test_signal_during_the_start_is_not_lost(spawner: Spawner, start: list[str], moment: str) -> None:
    """It arrives when the guard has its handlers and the program has not started."""
    script = f"""\
import os, signal, sys, time
sys.platform = {"linux" if start is GUARD else "darwin"!r}
from engine_plugin.process import guard
fork = os.fork
def slow():
    if {moment!r} == "before":
        os.kill(os.getpid(), signal.SIGTERM)
    pid = fork()
    if pid and {moment!r} == "after":
        os.kill(os.getpid(), signal.SIGTERM)
    elif not pid:
        time.sleep(0.2)
    return pid
os.fork = slow
os._exit(guard.main(sys.argv[1:]))
"""
    with running(spawner, [sys.executable, "-c", script, *CHILD, "idle:1000"]) as process:
        assert await asyncio.to_thread(process.wait, LIMIT) == -signal.SIGTERM
    assert spawner.left() == []


@everywhere
async def test_end_of_stdin_alone_does_not_end_the_program(spawner: Spawner, start: list[str]) -> None:
    """The input of a helper may end early. The program does not get what is written to the guard."""
    argv = [*start, *CHILD, f"until:{spawner.path('go')}", "print:done", "exit:4"]
    with running(spawner, argv, ENGINE_PLUGIN_PARENT=str(os.getpid())) as process:
        assert process.stdin is not None
        process.stdin.write("something\n")
        process.stdin.close()
        with pytest.raises(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, 0.3)
        (spawner.folder / "go").touch()
        assert await asyncio.to_thread(process.wait, LIMIT) == 4
        assert process.stdout is not None
        assert process.stdout.read() == "done\n"


@linux_only
def test_program_starts_with_default_signals_and_no_extra_descriptors(spawner: Spawner) -> None:
    """Signals are at their defaults (Python ignores two) and not blocked, and no descriptor or stdin is inherited."""
    script = "cat /proc/self/status; ls /proc/self/fd; readlink /proc/$$/fd/0; echo parent=$ENGINE_PLUGIN_PARENT"
    with running(spawner, [*GUARD, "sh", "-c", script], ENGINE_PLUGIN_PARENT=str(os.getpid())) as process:
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, err) == (0, "")
    status = dict(line.split(":\t") for line in out.splitlines() if ":\t" in line)
    # The parent of the tests may ignore others: a shell ignores some for background jobs.
    ours = (signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ)
    assert [number for number in ours if int(status["SigIgn"], 16) >> (number - 1) & 1] == []
    assert int(status["SigBlk"], 16) == 0
    # 3 is the look itself; the guard's parent-to-be is used up.
    assert out.splitlines()[-6:] == ["0", "1", "2", "3", "/dev/null", "parent="]


@everywhere
def test_inherited_signal_mask_does_not_hide_the_end_of_the_program(spawner: Spawner, start: list[str]) -> None:
    """A mask is inherited; without SIGCHLD the program's end would not be noticed."""
    script = "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals());"
    script += "os.execv(sys.argv[1], sys.argv[1:])"
    with running(spawner, [sys.executable, "-c", script, *start, *CHILD, "exit:4"]) as process:
        assert process.wait(LIMIT) == 4


@everywhere
def test_missing_or_unusable_command_is_reported(spawner: Spawner, start: list[str]) -> None:
    with running(spawner, start) as process:
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, out) == (2, "")
        assert err.startswith("usage: ")
    missing = spawner.path("no-such-command")
    for command, why in ((missing, "No such file or directory"), (str(spawner.folder), "Permission denied")):
        with running(spawner, [*start, command]) as process:
            out, err = process.communicate(timeout=LIMIT)
            assert (process.returncode, out, err) == (127, "", f"cannot run {command}: {why}\n")


def test_guard_without_a_command_exits_2() -> None:
    assert guard.main([]) == 2


@linux_only
async def test_waiting_guard_uses_little_memory_and_no_processor_time(spawner: Spawner) -> None:
    """It stays in memory beside every foreign engine."""
    with running(spawner, [*GUARD, *CHILD, "ignore-stdin", f"ready:{spawner.path('ready')}"]) as process:
        await until((spawner.folder / "ready").exists, "the program is up")
        watched = psutil.Process(process.pid)
        assert watched.num_threads() == 1
        memory = watched.memory_full_info()
        assert memory.uss < 8 << 20, memory
        before = watched.num_ctx_switches()
        end = time.monotonic() + 0.4
        with pytest.raises(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, end - time.monotonic())
        assert watched.num_ctx_switches().voluntary - before.voluntary <= 2, "it sleeps"
        process.terminate()
        assert await asyncio.to_thread(process.wait, LIMIT) == -signal.SIGTERM
