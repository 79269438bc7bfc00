"""Windows' Job Objects, which end engines with their plugin (requirement 9 of the field)."""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import sys
from ctypes import wintypes
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.process import job_windows, tree
from engine_plugin.process.child import ChildProcess
from tests.patience import until, within
from tests.process.conftest import CHILD, Spawner, alive, running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

windows_only = pytest.mark.skipif(
    sys.platform != "win32", reason="Job Objects are Windows'; elsewhere the guard is used"
)

# A plugin: spawns argv[2:], binds it to itself, tells its pid through the file argv[1], and lives until it is killed.
PLUGIN = """\
import os, subprocess, sys, time
from engine_plugin.process import job_windows, tree
child = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE, **tree.SPAWN_OPTIONS)
job = tree.bind_to_us(child.pid)
open(sys.argv[1] + ".new", "w").write(str(child.pid))
os.replace(sys.argv[1] + ".new", sys.argv[1])
time.sleep(60)
"""


async def spawn(spawner: Spawner, *actions: str) -> ChildProcess:
    child = ChildProcess()
    await child.spawn([*CHILD, *actions], spawner.env)
    return child


@pytest.mark.promise("F9")
@windows_only
@pytest.mark.promise("F7", "F9")
async def test_closed_job_ends_its_processes(spawner: Spawner) -> None:
    child = await spawn(spawner, "ignore-stdin")
    try:
        job = tree.bind_to_us(child.pid)
        assert alive(child.pid)
        job.close()
        job.close()
        await within(asyncio.wait({child.exited}))
        assert not alive(child.pid)
    finally:
        assert await child.kill()


@pytest.mark.promise("F7", "F9")
@windows_only
@pytest.mark.promise("F7", "F9")
async def test_engine_ends_when_its_plugin_is_terminated(spawner: Spawner) -> None:
    told: Path = spawner.folder / "pid"
    command = [sys.executable, "-c", PLUGIN, str(told), *CHILD, "ignore-stdin"]
    with running(spawner, command) as plugin:
        await until(told.exists, "the engine is up")
        engine = spawner.pid("pid")
        assert alive(engine)
        plugin.kill()
        await until(lambda: not alive(engine), "the engine has ended")


@windows_only
@pytest.mark.promise("F7", "F9")
async def test_ended_process_is_not_put_into_a_job(spawner: Spawner) -> None:
    child = await spawn(spawner, "exit:0")
    await within(asyncio.wait({child.exited}))
    assert await child.kill()
    with pytest.raises(OSError, match=r"\[WinError"):
        tree.bind_to_us(child.pid)


@windows_only
@pytest.mark.promise("F9")
async def test_process_is_suspended_until_it_is_in_the_job(spawner: Spawner) -> None:
    """It is resumed once it is in the job."""
    plugin = PLUGIN.replace(
        "job = ", "time.sleep(0.5); print(os.path.exists(sys.argv[1] + '-up'), flush=True)\njob = "
    )
    started = spawner.folder / "pid-up"
    with running(spawner, [sys.executable, "-c", plugin, spawner.path("pid"), *CHILD, f"ready:{started}"]) as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "False\n"
        await until(started.exists, "it runs")
        process.kill()
        await until(lambda: not alive(spawner.pid("pid")), "it has ended")


# Elsewhere than on Windows: what we ask of Windows, in which order, and with structures of which size.


class Kernel:
    """Stands for kernel32: records the calls, and fails in the given one."""

    def __init__(self, fails: str) -> None:
        self.fails = fails
        self.calls: list[str] = []
        self.limits = b""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "SetInformationJobObject":
                kind, structure, size = arguments[1:]
                assert (kind, size) == (9, ctypes.sizeof(structure._obj)), "JobObjectExtendedLimitInformation"
                self.limits = bytes(structure._obj)
            return 0 if name == self.fails else 7

        setattr(self, name, call)
        return call


@pytest.fixture
def job_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], Any]:
    """Make a job as on Windows, with that kernel."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(wintypes, "DWORD", ctypes.c_uint32)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: 5, raising=False)
    monkeypatch.setattr(ctypes, "WinError", lambda code: OSError(code, "refused"), raising=False)
    spec = importlib.util.spec_from_file_location("job_as_on_windows", job_windows.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(kernel: Kernel) -> Any:
        monkeypatch.setattr(ctypes, "WinDLL", lambda *_args, **_options: kernel, raising=False)
        return module.KillOnCloseJob(1234)

    return make


@pytest.mark.skipif(sys.platform == "win32" or sys.maxsize < 2**32, reason="Windows says it itself")
@pytest.mark.promise("F9")
def test_job_is_configured_before_the_process_is_assigned(job_of: Callable[[Kernel], Any]) -> None:
    kernel = Kernel("")
    job = job_of(kernel)
    assert kernel.calls == [
        "CreateJobObjectW",
        "OpenProcess",
        "SetInformationJobObject",
        "AssignProcessToJobObject",
        "CloseHandle",
    ]
    assert len(kernel.limits) == 144, "JOBOBJECT_EXTENDED_LIMIT_INFORMATION of 64 bit"
    flags = int.from_bytes(kernel.limits[16:20], "little")
    assert flags == 0x2000 | 0x400, "killed with the last handle, no window after a crash, and none breaks away"
    job.close()
    job.close()
    assert kernel.calls[5:] == ["CloseHandle"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows refuses when it wants to")
@pytest.mark.parametrize(
    ("fails", "closed"), [("CreateJobObjectW", 0), ("SetInformationJobObject", 2), ("AssignProcessToJobObject", 2)]
)
def test_failed_job_leaves_no_handle(job_of: Callable[[Kernel], Any], fails: str, closed: int) -> None:
    kernel = Kernel(fails)
    with pytest.raises(OSError, match="refused"):
        job_of(kernel)
    assert kernel.calls.count("CloseHandle") == closed
