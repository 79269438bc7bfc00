"""Modules of this package, and helpers, in processes of their own."""

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
from tests.process.conftest import CHILD, Spawner, alive, descriptors, running

ROOT = Path(engine_plugin.__file__).resolve().parent.parent


async def run(
    spawner: Spawner, *actions: str, stdin: bytes = b"", timeout: float = LIMIT
) -> tuple[int, bytes, bytes]:
    return await within(python.run_briefly([*CHILD, *actions], spawner.env, stdin, timeout))


async def test_module_runs_with_this_package_and_its_site_packages_first(spawner: Spawner) -> None:
    site = spawner.folder / "site"
    site.mkdir()
    (site / "looker.py").write_text("import json, sys, engine_plugin; print(json.dumps([sys.path, sys.argv[1:]]))")
    environ = python.module_environ({**spawner.env, "PYTHONPATH": "/elsewhere"}, site)
    status, out, err = await python.run_briefly(python.module_command("looker", "a b", "c"), environ)
    assert (status, err) == (0, b"")
    path, arguments = json.loads(out)
    assert path[:2] == [str(ROOT), str(site)]
    assert "/elsewhere" not in path
    assert "" not in path, "what lies in the working directory is not ours to import"
    assert arguments == ["a b", "c"]
    assert not list(site.glob("__pycache__"))
    assert python.module_environ({"A": "b"})["PYTHONPATH"] == str(ROOT)


async def test_run_passes_input_and_returns_status_and_output(spawner: Spawner) -> None:
    heard = spawner.folder / "heard"
    assert await run(spawner, "print:out", f"stdin:{heard}", "err:err", "exit:3", stdin=b"hello\n") == (
        3,
        b"out\n",
        b"err\n",
    )
    assert heard.read_text() == "hello\n"
    assert await run(spawner) == (0, b"", b""), "stdin ends"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
async def test_helper_ended_by_a_signal_returns_its_negative_number(spawner: Spawner) -> None:
    assert (await run(spawner, "die:SIGABRT"))[0] == -6


async def test_large_input_and_output_pass(spawner: Spawner) -> None:
    status, out, err = await run(spawner, "flood:2:2:lines", "flood:1:2:solid", stdin=b"x" * (2 << 20))
    assert (status, len(out), len(err)) == (0, 2 << 20, 2 << 20)


async def test_helper_that_does_not_read_its_input_is_tolerated(spawner: Spawner) -> None:
    assert (await run(spawner, "exit:0", stdin=b"x" * (4 << 20)))[0] == 0


async def test_helper_that_exceeds_its_limit_is_killed(spawner: Spawner) -> None:
    with pytest.raises(BadGatewayError, match=r"gave no answer in [\d.]+ s"):
        await run(
            spawner, "ignore-term", "ignore-stdin", f"ready:{spawner.path('up')}", "idle:1000", timeout=pace(0.3)
        )
    assert spawner.left() == []


@pytest.mark.promise("F24")
async def test_cancelled_run_kills_the_helper(spawner: Spawner) -> None:
    task = asyncio.create_task(run(spawner, "ignore-term", f"ready:{spawner.path('up')}", "idle:1000"))
    await until((spawner.folder / "up").exists, "up")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not alive(spawner.pid("up")), "the helper's end")  # it dies once the machine runs it


@pytest.mark.promise("F5")
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX sessions")
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("where", ["grandchild", "loner"])
async def test_grandchild_of_a_helper_is_ended_too(spawner: Spawner, where: str, ends: bool) -> None:
    """It holds the pipes open, which must not delay an answer that has arrived."""
    actions = [f"{where}:{spawner.path('grandchild')}", "print:answer"]
    if ends:
        assert await run(spawner, *actions, "exit:0") == (0, b"answer\n", b"")
    else:
        with pytest.raises(BadGatewayError):
            await run(spawner, *actions, "idle:1000", timeout=pace(0.5))
    assert not alive(spawner.pid("grandchild"))


async def test_unrunnable_program_raises(spawner: Spawner) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        await python.run_briefly([spawner.path("missing")], spawner.env)
    with pytest.raises(PermissionError, match=str(spawner.folder)):
        await python.run_briefly([str(spawner.folder)], spawner.env)
    with pytest.raises(FileNotFoundError):
        await python.run_with_output(["python-that-is-elsewhere"], spawner.env | {"PATH": str(spawner.folder)}, print)


def test_foreign_program_is_run_under_the_guard() -> None:
    command = python.guarded(["llama-server", "--version"])
    if sys.platform == "win32":
        assert command == ["llama-server", "--version"], "a Job Object does it there"
    else:
        assert command[0] == sys.executable
        assert command[-3:] == [guard.__file__, "llama-server", "--version"]


async def test_every_output_line_is_passed_to_the_callback(spawner: Spawner) -> None:
    said: list[str] = []
    actions = ["print:Collecting x", "err:a warning", "print:", "err0:half a line", "exit:3"]
    assert await within(python.run_with_output([*CHILD, *actions], spawner.env, said.append)) == 3
    assert sorted(said) == ["", "Collecting x", "a warning", "half a line"]
    said.clear()
    assert (
        await within(python.run_with_output([*CHILD, "flood:1:1:lines", "flood:2:1:solid"], spawner.env, said.append))
        == 0
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
@pytest.mark.parametrize("way", ["run_briefly", "run_with_output"])
async def test_helper_ends_when_its_plugin_is_killed(spawner: Spawner, way: str) -> None:
    """Such as pip or `llama-server --version`, at whatever moment the plugin dies."""
    actions = ["ignore-term", f"loner:{spawner.path('loner')}", f"ready:{spawner.path('up')}", "idle:1000"]
    telling = "yes" if way == "run_with_output" else ""
    with running(spawner, [sys.executable, "-c", PLUGIN, way, telling, *CHILD, *actions]) as plugin:
        await until((spawner.folder / "up").exists, "the helper is up")
        pids = [spawner.pid("up"), spawner.pid("loner")]
        assert all(alive(pid) for pid in pids)
        plugin.kill()
        await until(lambda: not any(alive(pid) for pid in pids), "both have ended")
        await until(lambda: spawner.left() == [], "and their guard")


@pytest.mark.promise("F7")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends by itself, soon")
async def test_module_of_this_package_ends_when_its_plugin_is_killed(spawner: Spawner) -> None:
    """It binds itself to its parent, and reads the end of its stdin."""
    plugin = """\
import asyncio, os, sys
from engine_plugin.process import guard, python
from engine_plugin.process.child import ChildProcess
async def main():
    argv = python.module_command("engine_plugin.engines.llamacpp.runner", "inspect")
    child = ChildProcess()
    await child.spawn(argv, python.module_environ(os.environ))
    open(sys.argv[1] + ".new", "w").write(str(child.pid))
    os.replace(sys.argv[1] + ".new", sys.argv[1])
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    with running(spawner, [sys.executable, "-c", plugin, spawner.path("up")]) as process:
        await until((spawner.folder / "up").exists, "the helper is up")
        process.kill()
        await until(lambda: not alive(spawner.pid("up")), "it has ended")


async def test_guard_of_a_helper_gets_the_right_parent_pid(spawner: Spawner) -> None:
    """Also where this process runs under a guard itself, whose variable is still in the environment."""
    environ = {**spawner.env, "ENGINE_PLUGIN_PARENT": "1"}
    assert await run(spawner, "print:ran") == (0, b"ran\n", b"")
    assert await python.run_briefly([*CHILD, "print:ran"], environ) == (0, b"ran\n", b"")


async def test_helpers_leave_no_descriptor(spawner: Spawner) -> None:
    await run(spawner, "exit:0")
    before = descriptors()
    for _ in range(10):
        await run(spawner, "exit:0")
        with pytest.raises(BadGatewayError):
            await run(spawner, "idle:1000", timeout=pace(0.02), stdin=b"x" * (1 << 20))
    await until(lambda: descriptors() <= before, "descriptors leak")
