"""Windows' Job Objects, by which engines end with their plugin (requirement 9 of the field)."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines import tree
from engine_plugin.engines.child import ChildProcess
from tests.engines.conftest import CHILD, Stage, alive, running, until, within

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    sys.platform != "win32", reason="Job Objects are Windows'; elsewhere the guard is used"
)

# A plugin: spawns argv[2:], binds it to itself, tells its pid through the file argv[1], and lives until it is killed.
PLUGIN = """\
import os, subprocess, sys, time
from engine_plugin.engines import tree
child = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE)
job = tree.bind_to_us(child.pid)
open(sys.argv[1] + ".new", "w").write(str(child.pid))
os.replace(sys.argv[1] + ".new", sys.argv[1])
time.sleep(60)
"""


async def spawn(stage: Stage, *actions: str) -> ChildProcess:
    return await ChildProcess.spawn([*CHILD, *actions], stage.env, lambda _stream, _data: None)


@pytest.mark.promise("F9")
async def test_closing_the_job_ends_all_in_it(stage: Stage) -> None:
    child = await spawn(stage, "ignore-stdin")
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
async def test_a_plugin_that_is_terminated_takes_its_engine_along(stage: Stage) -> None:
    told: Path = stage.folder / "pid"
    command = [sys.executable, "-c", PLUGIN, str(told), *CHILD, "ignore-stdin"]
    with running(stage, command) as plugin:
        await until(told.exists, "the engine is up")
        engine = stage.pid("pid")
        assert alive(engine)
        plugin.kill()
        await until(lambda: not alive(engine), "the engine has ended")


async def test_a_process_that_is_gone(stage: Stage) -> None:
    child = await spawn(stage, "exit:0")
    await within(asyncio.wait({child.exited}))
    assert await child.kill()
    with pytest.raises(OSError, match=r"\[WinError"):
        tree.bind_to_us(child.pid)
