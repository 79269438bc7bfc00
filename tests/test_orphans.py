"""No leftover processes: the hosted plugin is killed in every phase, with an engine that spawns processes.

Every process that descends from a test has its mark in the environment, and all must end.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from engine_plugin.host import PluginClient, launch
from tests.fake_engine import FakeEngine
from tests.hosted_at_pace import HOSTED
from tests.patience import LIMIT, pace, patience
from tests.shipped import shipped, write_manifest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere offspring outside of the group is not seen"),
]

REPOSITORY = Path(__file__).parents[1]
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
AT_ONCE = 1.0  # seconds at rest; it takes some 20 ms

# A program that spawns another in a session of its own, says that both are up, and stays, whatever it is asked for.
STUBBORN = """\
import os, pathlib, signal, subprocess, sys, time
signal.alarm(1000)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
stays = "import signal, time; signal.alarm(1000); signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
subprocess.Popen([sys.executable, "-I", "-S", "-c", stays], start_new_session=True)
pathlib.Path({up!r}).touch()
time.sleep(1000)
"""
HOST = """\
import asyncio, json, sys
from pathlib import Path
from engine_plugin.host import launch
async def main():
    plugin = await launch(json.loads(sys.argv[1]), cwd=Path(sys.argv[2]))
    await plugin.start_engine()
    await plugin.load_model("tiny-chat-gguf")
    print(plugin.pid, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
THREADLESS = """\
import signal, sys
from engine_plugin.app import main
from tests.goplugin.plugin import refuse_threads
signal.signal(signal.SIGUSR1, lambda _number, _frame: (refuse_threads(), sys.stderr.write("no threads\\n")))
sys.exit(main())
"""
PIP = """\
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from engine_plugin.install import pip
here = Path(sys.argv[1])
asyncio.run(pip.install_packages(here / "target", ["x"], os.environ, print, scratch=here))
"""


class Workspace:
    """A directory with a plugin.yaml for a fake engine, and all processes that descend from this test."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.mark = uuid.uuid4().hex
        self.env = {
            "ORPHANS_TEST": self.mark,
            "TMPDIR": str(place / "tmp"),
            "PYTHONPATH": str(REPOSITORY),
            "TEST_PACE": str(pace(1.0)),
        }
        (place / "tmp").mkdir()
        self.fake = FakeEngine.install(place / "bin", {"grandchild": "own", "ignore_term": True, "tokens": -1})
        self.configure()

    def configure(self, **options: object) -> None:
        """Write plugin.yaml with these options of the engine."""
        shape = shipped("llamacpp")
        shape["engine"] |= {"threads": 1, "stop_timeout": 30} | self.fake.options | options
        shape["resources"]["data_dir"] = str(self.place / "data")
        write_manifest(self.place, shape)

    async def launch(self) -> PluginClient:
        """Launch the plugin with this process as its host."""
        return await launch(HOSTED, cwd=self.place, env=self.env, start_timeout=LIMIT)

    def family(self) -> list[psutil.Process]:
        """Return every running process with the mark."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("ORPHANS_TEST") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    async def gone(self, seconds: float = AT_ONCE) -> None:
        """Wait until every process with the mark has ended."""
        async with asyncio.timeout(patience(seconds)):
            while self.family():  # noqa: ASYNC110  # there is no event
                await asyncio.sleep(0.002)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition for which there is no event."""
        async with asyncio.timeout(LIMIT):
            while not condition():  # noqa: ASYNC110  # there is no event
                await asyncio.sleep(0.005)

    def records(self) -> list[Path]:
        """The records of engine processes."""
        return list((self.place / "data" / "run").glob("*.json"))


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    place = Path(tempfile.mkdtemp(prefix="epo-"))
    workspace = Workspace(place)
    try:
        yield workspace
        left = workspace.family()
        assert left == []
    finally:
        for process in workspace.family():
            process.kill()
        shutil.rmtree(place)


def kill(plugin: PluginClient) -> None:
    assert plugin.pid is not None
    os.kill(plugin.pid, signal.SIGKILL)


async def abandoned(*calls: Awaitable[Any]) -> None:
    """Run a call on a plugin that is killed, and ignore its outcome."""
    for call in calls:
        assert isinstance(call, asyncio.Task)
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


# The plugin is killed


@pytest.mark.promise("F5", "F7")
async def test_no_process_is_left_when_killed_during_the_version_check(workspace: Workspace) -> None:
    """`llama-server --version` never ends here and has a child."""
    up = workspace.place / "up"
    workspace.fake.executable.write_text(f"#!{sys.executable} -IS\n" + STUBBORN.format(up=str(up)))
    async with await workspace.launch() as plugin:
        starting = asyncio.create_task(plugin.start_engine())
        await workspace.until(up.exists)
        assert len(workspace.family()) == 4, "plugin, guard, program, its child"
        kill(plugin)
        await workspace.gone()
        await abandoned(starting)


@pytest.mark.promise("F5", "F7", "F25")
async def test_no_process_is_left_when_killed_during_pip_install(workspace: Workspace) -> None:
    up = workspace.place / "up"
    for name, text in (("__init__", ""), ("__main__", STUBBORN.format(up=str(up)))):
        path = workspace.place / "pip" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    plugin = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PIP, str(workspace.place)),
        env={**os.environ, **workspace.env},
        stdout=subprocess.DEVNULL,
    )
    await workspace.until(up.exists)
    plugin.kill()
    await plugin.wait()
    await workspace.gone()


@pytest.mark.promise("F5", "F7", "F16")
async def test_no_process_is_left_when_killed_during_a_load(workspace: Workspace) -> None:
    workspace.fake.behave({"grandchild": "own", "ignore_term": True, "load_until": str(workspace.fake.gate("never"))})
    async with await workspace.launch() as plugin:
        await plugin.start_engine()
        loading = asyncio.create_task(plugin.load_model("tiny-chat-gguf"))
        await workspace.fake.event("grandchild")
        kill(plugin)
        await workspace.gone()
        await abandoned(loading)


@pytest.mark.promise("F5", "F7")
async def test_no_process_is_left_when_killed_with_two_loaded_models(
    workspace: Workspace, record_property: Callable[[str, object], None]
) -> None:
    async with await workspace.launch() as plugin:
        await plugin.start_engine()
        await asyncio.gather(plugin.load_model("tiny-chat-gguf"), plugin.load_model("tiny-embed-gguf"))
        assert len(workspace.family()) == 7, "the plugin, and two of guard, engine, its child"
        began = time.monotonic()
        kill(plugin)
        await workspace.gone()
        took = time.monotonic() - began
        record_property("kill_ms", round(took * 1000, 1))
        print(f"kill -9 of the plugin: nothing left after {took * 1000:.0f} ms")


@pytest.mark.promise("F5", "F7")
async def test_no_process_is_left_when_killed_during_a_stream(workspace: Workspace) -> None:
    async with await workspace.launch() as plugin:
        await plugin.start_engine()
        async with plugin.stream("chat", HELLO | {"max_tokens": -1}) as chunks:
            await anext(chunks)
            kill(plugin)
            await workspace.gone()


@pytest.mark.promise("F5", "F7", "F17")
async def test_no_process_is_left_when_killed_while_stopping_the_engine(workspace: Workspace) -> None:
    async with await workspace.launch() as plugin:
        await plugin.start_engine()
        await plugin.load_model("tiny-chat-gguf")
        stopping = asyncio.create_task(plugin.stop_engine())
        await workspace.fake.event("sigterm")
        kill(plugin)
        await workspace.gone()
        await abandoned(stopping)


# The host is killed


@pytest.mark.promise("F3", "F5", "F7")
async def test_plugin_and_engine_end_when_their_host_is_killed(workspace: Workspace) -> None:
    """The plugin and its engine end within the limit, although the engine ignores SIGTERM."""
    import json

    host = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOST, json.dumps(HOSTED), str(workspace.place)),
        env={**os.environ, **workspace.env},
        stdout=subprocess.PIPE,
    )
    assert host.stdout is not None
    async with asyncio.timeout(LIMIT):
        plugin = int(await host.stdout.readline())
    assert plugin in {process.pid for process in workspace.family()}
    assert len(workspace.family()) == 5, "host, plugin, guard, engine, its child"
    host.kill()
    await host.wait()
    await workspace.gone(3.0)


@pytest.mark.promise("U2")
@pytest.mark.parametrize("way", ["Shutdown", "the host is killed"])
async def test_engine_ends_with_a_plugin_that_cannot_create_threads(workspace: Workspace, way: str) -> None:
    import json

    workspace.configure(stop_timeout=0.2)
    command = [sys.executable, "-c", THREADLESS]
    if way == "Shutdown":
        refused = asyncio.Event()
        hear = lambda line: refused.set() if "no threads" in line.message else None  # noqa: E731
        async with await launch(
            command, cwd=workspace.place, env=workspace.env, start_timeout=LIMIT, on_log=hear
        ) as plugin:
            await plugin.start_engine()
            await plugin.load_model("tiny-chat-gguf")
            assert plugin.pid is not None
            os.kill(plugin.pid, signal.SIGUSR1)
            async with asyncio.timeout(LIMIT):
                await refused.wait()
            await plugin.kill()
            assert plugin.returncode == 0
            assert workspace.records() == []
    else:
        host = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", HOST, json.dumps(command), str(workspace.place)),
            env={**os.environ, **workspace.env},
            stdout=subprocess.PIPE,
        )
        assert host.stdout is not None
        async with asyncio.timeout(LIMIT):
            pid = int(await host.stdout.readline())
        os.kill(pid, signal.SIGUSR1)
        host.kill()
        await host.wait()
    await workspace.gone()


# A plugin comes back


@pytest.mark.promise("F7", "F11")
async def test_processes_of_a_killed_plugin_are_ended_by_the_next(workspace: Workspace) -> None:
    """The guards are suspended, so the engines stay. Those of another plugin are kept."""
    workspace.configure(stop_timeout=0.2)
    async with await workspace.launch() as other, await workspace.launch() as plugin:
        for each in (other, plugin):
            await each.start_engine()
            await each.load_model("tiny-chat-gguf")
        [guard] = psutil.Process(plugin.pid).children()
        left = [guard, *guard.children(recursive=True)]
        assert len(left) == 3
        guard.suspend()
        kill(plugin)
        await workspace.until(lambda: guard.ppid() != plugin.pid)
        others = [process for process in workspace.family() if process not in left]
        assert len(others) == 4, "the other plugin, its guard, engine, and the engine's child"
        assert set(left) <= set(workspace.family()), "they live on"
        assert len(workspace.records()) == 2
        async with await workspace.launch() as successor:
            await successor.start_engine()
            assert not set(left) & set(workspace.family())
            assert set(others) <= set(workspace.family())
            assert len(workspace.records()) == 1
            assert await other.running_models()
            assert (await other.invoke("chat", HELLO | {"max_tokens": 2}))["choices"]


@pytest.mark.promise("F11", "P11")
async def test_foreign_process_of_the_same_program_is_kept(workspace: Workspace) -> None:
    """The same program with the same arguments, started otherwise, keeps its process, port and socket."""
    workspace.configure(stop_timeout=0.2)
    async with await workspace.launch() as plugin:
        await plugin.start_engine()
        await plugin.load_model("tiny-chat-gguf")
        [engine] = psutil.Process(plugin.pid).children()[0].children()
        command = engine.cmdline()
        key = workspace.place / "key"
        key.write_text("another user's\n")
        socket = workspace.place / "their.sock"
        for option, value in (("--api-key-file", str(key)), ("--host", str(socket))):
            command[command.index(option) + 1] = value
        theirs = await asyncio.create_subprocess_exec(*command, env={**os.environ, "ORPHANS_TEST": workspace.mark})
        child: list[psutil.Process] = []
        try:
            await workspace.until(socket.exists)
            child = psutil.Process(theirs.pid).children()
            assert len(child) == 1
            kill(plugin)
            async with await workspace.launch() as successor:
                await successor.start_engine()
                await successor.load_model("tiny-chat-gguf")
                await successor.stop_engine()
                assert theirs.returncode is None
                assert socket.exists()
                assert all(process.is_running() for process in child)
        finally:
            theirs.kill()
            await theirs.wait()
            for process in child:
                process.kill()
            await workspace.until(lambda: not set(child) & set(workspace.family()))


@pytest.mark.promise("F11")
async def test_evicted_model_has_ended_before_the_next_is_loaded(workspace: Workspace) -> None:
    """Its children in other sessions too, because their memory counts as well."""
    workspace.configure(max_loaded_models=1, stop_timeout=0.1)
    gate = workspace.fake.gate("loaded")
    life = {"grandchild": "own", "ignore_term": True}
    workspace.fake.behave(life, tiny_embed_gguf=[{**life, "load_until": str(gate)}])
    async with await workspace.launch() as plugin:
        await plugin.start_engine()
        await plugin.load_model("tiny-chat-gguf")
        first = [process for process in workspace.family() if process.pid not in (plugin.pid, os.getpid())]
        assert len(first) == 3, "guard, engine, its child"
        loading = asyncio.create_task(plugin.load_model("tiny-embed-gguf"))
        await workspace.fake.event("started", model="tiny-embed-gguf")
        assert not set(first) & set(workspace.family())
        gate.touch()
        await loading
