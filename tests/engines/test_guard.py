"""An engine must not outlive its plugin, even one that is killed. Numbers are the field's requirements."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from engine_plugin.engines import guard
from tests.engines.conftest import CHILD, Stage, alive, running, until

GUARD = [sys.executable, "-m", "engine_plugin.engines.guard"]
STAY = """\
import sys
from engine_plugin.engines import guard
guard._STOP_WAIT = 0.3
sys.exit(guard._stay(sys.argv[1:]))
"""
STAYING = [sys.executable, "-c", STAY]
# What a plugin does: spawns argv[1:], says so in the environment, and lives until it is killed.
PLUGIN = """\
import os, subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], env=os.environ | {"ENGINE_PLUGIN_PARENT": str(os.getpid())}, stdin=-1)
time.sleep(60 if os.environ["LIVES"] else 0)
os._exit(0)
"""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows uses a Job Object instead of the guard")


@pytest.mark.promise("F7", "F8")
@linux_only
@pytest.mark.parametrize("armed", ["by exec", "by itself"])
async def test_a_killed_parent_takes_its_child_along(stage: Stage, armed: str) -> None:
    """(7, 8) SIGKILL of the plugin; nobody can react but the kernel."""
    path = stage.path("ready")
    argv = [*GUARD, *CHILD, "ignore-term", "ignore-stdin", f"ready:{path}"]
    if armed == "by itself":
        script = (
            "import os, sys, time; from engine_plugin.engines import guard; guard.arm();"
            "open(sys.argv[1] + '.new', 'w').write(str(os.getpid())); os.replace(sys.argv[1] + '.new', sys.argv[1]);"
            "time.sleep(60)"
        )
        argv = [sys.executable, "-c", script, path]
    with running(stage, [sys.executable, "-c", PLUGIN, *argv], LIVES="yes") as plugin:
        await until(Path(path).exists, "the child is up")
        pid = stage.pid("ready")
        assert alive(pid)
        plugin.send_signal(signal.SIGKILL)
        async with asyncio.timeout(1):
            await until(lambda: not alive(pid), "the child has ended")


@pytest.mark.promise("F8")
@linux_only
async def test_a_parent_that_died_before_the_child_was_armed(stage: Stage) -> None:
    """(8) The kernel sends nothing for a parent that is gone already, hence the look at getppid()."""
    script = (
        "import os, sys, time\n"
        "from engine_plugin.engines import guard\n"
        "open(sys.argv[1] + '/up.new', 'w').write(str(os.getpid()))\n"
        "os.replace(sys.argv[1] + '/up.new', sys.argv[1] + '/up')\n"
        "while not os.path.exists(sys.argv[1] + '/go'): time.sleep(0.005)\n"
        "guard.main(['touch', sys.argv[1] + '/ran'])\n"
    )
    argv = [sys.executable, "-c", script, str(stage.folder)]
    with running(stage, [sys.executable, "-c", PLUGIN, *argv], LIVES="") as plugin:
        assert plugin.wait(10) == 0
        await until((stage.folder / "up").exists, "the child is up")
        (stage.folder / "go").touch()
        await until(lambda: not alive(stage.pid("up")), "the child has ended")
    assert not (stage.folder / "ran").exists()


@pytest.mark.promise("F8")
@linux_only
def test_another_parent_than_the_named_one(stage: Stage) -> None:
    ran = stage.folder / "ran"
    with running(stage, [*GUARD, "touch", str(ran)], ENGINE_PLUGIN_PARENT="1") as process:
        assert process.wait(10) == 0
    assert not ran.exists()
    with running(stage, [*GUARD, "touch", str(ran)], ENGINE_PLUGIN_PARENT=str(os.getpid())) as process:
        assert process.wait(10) == 0
    assert ran.exists()


@pytest.mark.promise("F8")
@linux_only
def test_the_guard_becomes_the_command(stage: Stage) -> None:
    """(6) No process of ours in between: signals and the exit status are the command's own."""
    script = "import os, sys; print(os.getpid(), os.environ.get('ENGINE_PLUGIN_PARENT')); sys.exit(7)"
    command = [sys.executable, "-I", "-S", "-c", script]
    with running(stage, [*GUARD, *command], ENGINE_PLUGIN_PARENT=str(os.getpid())) as process:
        assert process.communicate(timeout=10)[0].split() == [str(process.pid), "None"], "what was for us is used up"
        assert process.returncode == 7


@pytest.mark.promise("G33")
@linux_only
def test_the_command_gets_signals_as_they_come_by_default(stage: Stage) -> None:
    """Python ignores SIGPIPE and SIGXFSZ, and what is ignored stays so over exec."""
    with running(stage, [*GUARD, "grep", "SigIgn", "/proc/self/status"]) as process:
        name, mask = process.communicate(timeout=10)[0].split()
        assert name == "SigIgn:"
        # Others may be ignored by whoever started the tests: a shell ignores some for what is in its background.
        restored = (signal.SIGPIPE, signal.SIGXFSZ)
        assert [number for number in restored if int(mask, 16) >> (number - 1) & 1] == []


@posix_only
@pytest.mark.parametrize("start", [GUARD, STAYING])
def test_what_is_no_command(stage: Stage, start: list[str]) -> None:
    missing = stage.path("no-such-command")
    if start is GUARD:
        with running(stage, start) as process:
            out, err = process.communicate(timeout=10)
            assert (process.returncode, out) == (2, "")
            assert err.startswith("usage: ")
    for command, why in ((missing, "No such file or directory"), (str(stage.folder), "Permission denied")):
        with running(stage, [*start, command]) as process:
            out, err = process.communicate(timeout=10)
            if start is GUARD:
                assert (process.returncode, out, err) == (127, "", f"cannot run {command}: {why}\n")
            else:
                assert process.returncode == 1


@posix_only
def test_main_where_nothing_can_be_execd(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other POSIX systems: main goes by `_stay`."""
    script = f"import sys; sys.platform = 'darwin'; {STAY.replace('_stay', 'main')}"
    with running(stage, [sys.executable, "-c", script, *CHILD, "exit:6"]) as process:
        assert process.wait(10) == 6
    with running(stage, [sys.executable, "-c", script, stage.path("missing")]) as process:
        assert (
            process.communicate(timeout=10)[1] == f"cannot run {stage.path('missing')}: No such file or directory\n"
        )
        assert process.returncode == 127
    assert guard.main([]) == 2


@pytest.mark.promise("F7", "F8")
@posix_only
@pytest.mark.parametrize("obeys", [True, False])
async def test_staying_ends_the_child_when_stdin_ends(stage: Stage, obeys: bool) -> None:
    """(7, 8) The end of stdin means that the plugin is gone."""
    stubborn = [] if obeys else ["ignore-term"]
    argv = [*STAYING, *CHILD, *stubborn, "ignore-stdin", f"ready:{stage.path('ready')}", "idle:50"]
    # The child's own stdin is none of the plugin's, so it would see its end at once: hence idle.
    with running(stage, argv) as process:
        await until((stage.folder / "ready").exists, "the child is up")
        pid = stage.pid("ready")
        assert pid != process.pid
        assert process.stdin is not None
        process.stdin.close()
        await until(lambda: not alive(pid), "the child has ended")
        ended_by = signal.SIGTERM if obeys else signal.SIGKILL
        assert await asyncio.to_thread(process.wait, 10) == -ended_by


@posix_only
async def test_staying_passes_sigterm_on(stage: Stage) -> None:
    script = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: os._exit(5));"
        "open(sys.argv[1], 'w').close(); time.sleep(50)"
    )
    command = [sys.executable, "-I", "-S", "-c", script, stage.path("ready")]
    with running(stage, [*STAYING, *command]) as process:
        await until((stage.folder / "ready").exists, "the child is up")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 10) == 5


@posix_only
@pytest.mark.parametrize(
    ("action", "status"), [("exit:0", 0), ("exit:9", 9), ("die:SIGABRT", -6), ("die:SIGKILL", -9)]
)
def test_staying_passes_the_exit_status_on(stage: Stage, action: str, status: int) -> None:
    with running(stage, [*STAYING, *CHILD, action]) as process:
        assert process.wait(10) == status


@posix_only
async def test_sigterm_in_the_moment_of_the_start_is_not_lost(stage: Stage) -> None:
    """Between the child's birth and our knowing it."""
    script = """\
import os, signal, subprocess, sys
from engine_plugin.engines import guard
popen = subprocess.Popen
def slow(*args, **kwargs):
    child = popen(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGTERM)
    return child
subprocess.Popen = slow
sys.exit(guard._stay(sys.argv[1:]))
"""
    with running(stage, [sys.executable, "-c", script, *CHILD, "idle:50"]) as process:
        assert await asyncio.to_thread(process.wait, 10) == -signal.SIGTERM
    assert stage.left() == []
