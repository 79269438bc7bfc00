"""Modules of ours in processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import pytest

import engine_plugin
from engine_plugin.engines import python
from engine_plugin.errors import BadGatewayError
from tests.engines.conftest import CHILD, Stage, alive, descriptors, until, within

ROOT = Path(engine_plugin.__file__).resolve().parent.parent


async def run(stage: Stage, *actions: str, stdin: bytes = b"", timeout: float = 10.0) -> tuple[int, bytes, bytes]:
    return await within(python.run_briefly([*CHILD, *actions], stage.env, stdin, timeout))


async def test_a_module_runs_with_our_package_and_the_site_first(stage: Stage) -> None:
    site = stage.folder / "site"
    site.mkdir()
    (site / "looker.py").write_text("import json, sys, engine_plugin; print(json.dumps([sys.path, sys.argv[1:]]))")
    environ = python.module_environ({**stage.env, "PYTHONPATH": "/elsewhere"}, site)
    status, out, err = await python.run_briefly(python.module_command("looker", "a b", "c"), environ)
    assert (status, err) == (0, b"")
    path, arguments = json.loads(out)
    assert path[:2] == [str(ROOT), str(site)]
    assert "/elsewhere" not in path
    assert "" not in path, "what lies in the working directory is not ours to import"
    assert arguments == ["a b", "c"]
    assert not list(site.glob("__pycache__"))
    assert python.module_environ({"A": "b"})["PYTHONPATH"] == str(ROOT)


async def test_status_output_and_input(stage: Stage) -> None:
    heard = stage.folder / "heard"
    assert await run(stage, "print:out", f"stdin:{heard}", "err:err", "exit:3", stdin=b"hello\n") == (
        3,
        b"out\n",
        b"err\n",
    )
    assert heard.read_text() == "hello\n"
    assert await run(stage) == (0, b"", b""), "stdin ends"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
async def test_a_helper_ended_by_a_signal(stage: Stage) -> None:
    assert (await run(stage, "die:SIGABRT"))[0] == -6


async def test_a_big_answer_and_a_big_question(stage: Stage) -> None:
    status, out, err = await run(stage, "flood:2:2:lines", "flood:1:2:solid", stdin=b"x" * (2 << 20))
    assert (status, len(out), len(err)) == (0, 2 << 20, 2 << 20)


async def test_one_that_does_not_read_its_input(stage: Stage) -> None:
    assert (await run(stage, "exit:0", stdin=b"x" * (4 << 20)))[0] == 0


async def test_too_slow(stage: Stage) -> None:
    began = time.monotonic()
    with pytest.raises(BadGatewayError, match=r"gave no answer in 0\.3 s"):
        await run(stage, "ignore-term", "ignore-stdin", f"ready:{stage.path('up')}", "idle:50", timeout=0.3)
    assert time.monotonic() - began < 5
    assert stage.left() == []


@pytest.mark.promise("F24")
async def test_cancelled(stage: Stage) -> None:
    task = asyncio.create_task(run(stage, "ignore-term", f"ready:{stage.path('up')}", "idle:50"))
    await until((stage.folder / "up").exists, "up")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(stage.pid("up"))


@pytest.mark.promise("F5")
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX sessions")
@pytest.mark.parametrize("ends", [True, False])
async def test_a_grandchild_is_ended_too(stage: Stage, ends: bool) -> None:
    """It holds the pipes open, which must not keep an answer from us that is there already."""
    actions = [f"grandchild:{stage.path('grandchild')}", "print:answer"]
    if ends:
        assert await run(stage, *actions, "exit:0") == (0, b"answer\n", b"")
    else:
        with pytest.raises(BadGatewayError):
            await run(stage, *actions, "idle:50", timeout=0.5)
    assert not alive(stage.pid("grandchild"))


async def test_what_cannot_be_run(stage: Stage) -> None:
    with pytest.raises(FileNotFoundError):
        await python.run_briefly([stage.path("missing")], stage.env)


@pytest.mark.promise("F8")
async def test_the_guard_of_a_helper_knows_its_parent(stage: Stage) -> None:
    """Also where we are somebody's guarded child ourselves and his name is still in the environment."""
    argv = python.module_command("engine_plugin.engines.guard", sys.executable, "-c", "print('ran')")
    environ = python.module_environ({**stage.env, "ENGINE_PLUGIN_PARENT": "1"})
    assert await python.run_briefly(argv, environ) == (0, b"ran" + os.linesep.encode(), b"")


@pytest.mark.promise("P12")
async def test_helpers_leave_no_descriptor(stage: Stage) -> None:
    await run(stage, "exit:0")
    before = descriptors()
    for _ in range(10):
        await run(stage, "exit:0")
        with pytest.raises(BadGatewayError):
            await run(stage, "idle:50", timeout=0.02, stdin=b"x" * (1 << 20))
    await until(lambda: descriptors() <= before, "descriptors leak")
