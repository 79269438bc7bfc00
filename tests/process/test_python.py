"""Modules of ours in processes of their own."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

import engine_plugin
from engine_plugin.errors import BadGatewayError
from engine_plugin.process import guard, python
from tests.patience import LIMIT, pace, until, within
from tests.process.conftest import CHILD, Stage, alive, descriptors, running

ROOT = Path(engine_plugin.__file__).resolve().parent.parent


async def run(stage: Stage, *actions: str, stdin: bytes = b"", timeout: float = LIMIT) -> tuple[int, bytes, bytes]:
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
    with pytest.raises(BadGatewayError, match=r"gave no answer in [\d.]+ s"):
        await run(stage, "ignore-term", "ignore-stdin", f"ready:{stage.path('up')}", "idle:1000", timeout=pace(0.3))
    assert stage.left() == []


@pytest.mark.promise("F24")
async def test_cancelled(stage: Stage) -> None:
    task = asyncio.create_task(run(stage, "ignore-term", f"ready:{stage.path('up')}", "idle:1000"))
    await until((stage.folder / "up").exists, "up")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(stage.pid("up"))


@pytest.mark.promise("F5")
@pytest.mark.promise("F5")
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX sessions")
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("where", ["grandchild", "loner"])
async def test_a_grandchild_is_ended_too(stage: Stage, where: str, ends: bool) -> None:
    """It holds the pipes open, which must not keep an answer from us that is there already."""
    actions = [f"{where}:{stage.path('grandchild')}", "print:answer"]
    if ends:
        assert await run(stage, *actions, "exit:0") == (0, b"answer\n", b"")
    else:
        with pytest.raises(BadGatewayError):
            await run(stage, *actions, "idle:1000", timeout=pace(0.5))
    assert not alive(stage.pid("grandchild"))


async def test_what_cannot_be_run(stage: Stage) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        await python.run_briefly([stage.path("missing")], stage.env)
    with pytest.raises(PermissionError, match=str(stage.folder)):
        await python.run_briefly([str(stage.folder)], stage.env)
    with pytest.raises(FileNotFoundError):
        await python.run_telling(["python-that-is-elsewhere"], stage.env | {"PATH": str(stage.folder)}, print)


def test_what_is_guarded() -> None:
    command = python.guarded(["llama-server", "--version"])
    if sys.platform == "win32":
        assert command == ["llama-server", "--version"], "a Job Object does it there"
    else:
        assert command[0] == sys.executable
        assert command[-3:] == [guard.__file__, "llama-server", "--version"]


async def test_every_line_is_told(stage: Stage) -> None:
    said: list[str] = []
    actions = ["print:Collecting x", "err:a warning", "print:", "err0:half a line", "exit:3"]
    assert await within(python.run_telling([*CHILD, *actions], stage.env, said.append)) == 3
    assert sorted(said) == ["", "Collecting x", "a warning", "half a line"]
    said.clear()
    assert (
        await within(python.run_telling([*CHILD, "flood:1:1:lines", "flood:2:1:solid"], stage.env, said.append)) == 0
    )
    assert len(said) == (1 << 20) // 64 + 1


# A plugin runs a helper in the given way, and tells its own pid's file when the helper is up.
PLUGIN = """\
import asyncio, os, sys
from engine_plugin.process import guard, python
asyncio.run(getattr(python, sys.argv[1])(sys.argv[3:], dict(os.environ), *([print] if sys.argv[2] else [])))
"""


@pytest.mark.promise("F5", "F7")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere those in a session of their own are for the records")
@pytest.mark.parametrize("way", ["run_briefly", "run_telling"])
async def test_a_helper_ends_with_a_killed_plugin(stage: Stage, way: str) -> None:
    """pip, `llama-server --version`: in whatever moment the plugin dies."""
    actions = ["ignore-term", f"loner:{stage.path('loner')}", f"ready:{stage.path('up')}", "idle:1000"]
    telling = "yes" if way == "run_telling" else ""
    with running(stage, [sys.executable, "-c", PLUGIN, way, telling, *CHILD, *actions]) as plugin:
        await until((stage.folder / "up").exists, "the helper is up")
        pids = [stage.pid("up"), stage.pid("loner")]
        assert all(alive(pid) for pid in pids)
        plugin.kill()
        await until(lambda: not any(alive(pid) for pid in pids), "both have ended")
        await until(lambda: stage.left() == [], "and their guard")


@pytest.mark.promise("F7")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends by itself, soon")
async def test_a_module_of_ours_ends_with_a_killed_plugin(stage: Stage) -> None:
    """It arms itself, and it sees the end of its stdin."""
    plugin = """\
import asyncio, os, sys
from engine_plugin.process import guard, python
from engine_plugin.process.child import ChildProcess
async def main():
    argv = python.module_command("engine_plugin.engines.llamacpp.runner", "inspect")
    child = await ChildProcess.spawn(argv, python.module_environ(os.environ), lambda *_: None)
    open(sys.argv[1] + ".new", "w").write(str(child.pid))
    os.replace(sys.argv[1] + ".new", sys.argv[1])
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    with running(stage, [sys.executable, "-c", plugin, stage.path("up")]) as process:
        await until((stage.folder / "up").exists, "the helper is up")
        process.kill()
        await until(lambda: not alive(stage.pid("up")), "it has ended")


async def test_the_guard_of_a_helper_knows_its_parent(stage: Stage) -> None:
    """Also where we are somebody's guarded child ourselves and his name is still in the environment."""
    environ = {**stage.env, "ENGINE_PLUGIN_PARENT": "1"}
    assert await run(stage, "print:ran") == (0, b"ran\n", b"")
    assert await python.run_briefly([*CHILD, "print:ran"], environ) == (0, b"ran\n", b"")


async def test_helpers_leave_no_descriptor(stage: Stage) -> None:
    await run(stage, "exit:0")
    before = descriptors()
    for _ in range(10):
        await run(stage, "exit:0")
        with pytest.raises(BadGatewayError):
            await run(stage, "idle:1000", timeout=pace(0.02), stdin=b"x" * (1 << 20))
    await until(lambda: descriptors() <= before, "descriptors leak")
