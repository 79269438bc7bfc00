"""Nobody is left behind: the hosted plugin, killed in every phase, over an engine that spawns processes of its own.

Every process that descends from a test bears its mark in the environment, and all must be gone, wherever they went.
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


class Scene:
    """A directory with a plugin.yaml over a fake engine, and everything that descends from this test."""

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
        """The plugin, hosted by this process."""
        return await launch(HOSTED, cwd=self.place, env=self.env, start_timeout=LIMIT)

    def family(self) -> list[psutil.Process]:
        """Every process that bears the mark and is alive."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("ORPHANS_TEST") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    async def gone(self, seconds: float = AT_ONCE) -> None:
        """Wait until the whole family is."""
        async with asyncio.timeout(patience(seconds)):
            while self.family():  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.002)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what nobody tells."""
        async with asyncio.timeout(LIMIT):
            while not condition():  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.005)

    def records(self) -> list[Path]:
        """The records of engine processes."""
        return list((self.place / "data" / "run").glob("*.json"))


@pytest.fixture
def scene() -> Iterator[Scene]:
    place = Path(tempfile.mkdtemp(prefix="epo-"))
    scene = Scene(place)
    try:
        yield scene
        left = scene.family()
        assert left == []
    finally:
        for process in scene.family():
            process.kill()
        shutil.rmtree(place)


def kill(plugin: PluginClient) -> None:
    assert plugin.pid is not None
    os.kill(plugin.pid, signal.SIGKILL)


async def abandoned(*calls: Awaitable[Any]) -> None:
    """What was called on a plugin that died, whatever became of it."""
    for call in calls:
        assert isinstance(call, asyncio.Task)
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


# The plugin is killed


@pytest.mark.promise("F5", "F7")
async def test_while_the_software_is_tried_out(scene: Scene) -> None:
    """`llama-server --version`, which here never ends and has spawned something."""
    up = scene.place / "up"
    scene.fake.executable.write_text(f"#!{sys.executable} -IS\n" + STUBBORN.format(up=str(up)))
    async with await scene.launch() as plugin:
        starting = asyncio.create_task(plugin.start_engine())
        await scene.until(up.exists)
        assert len(scene.family()) == 4, "plugin, guard, program, its child"
        kill(plugin)
        await scene.gone()
        await abandoned(starting)


@pytest.mark.promise("F5", "F7", "F25")
async def test_while_pip_installs(scene: Scene) -> None:
    up = scene.place / "up"
    for name, text in (("__init__", ""), ("__main__", STUBBORN.format(up=str(up)))):
        path = scene.place / "pip" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    plugin = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PIP, str(scene.place)), env={**os.environ, **scene.env}, stdout=subprocess.DEVNULL
    )
    await scene.until(up.exists)
    plugin.kill()
    await plugin.wait()
    await scene.gone()


@pytest.mark.promise("F5", "F7", "F16")
async def test_while_a_model_is_loaded(scene: Scene) -> None:
    scene.fake.behave({"grandchild": "own", "ignore_term": True, "load_until": str(scene.fake.gate("never"))})
    async with await scene.launch() as plugin:
        await plugin.start_engine()
        loading = asyncio.create_task(plugin.load_model("tiny-chat-gguf"))
        await scene.fake.event("grandchild")
        kill(plugin)
        await scene.gone()
        await abandoned(loading)


@pytest.mark.promise("F5", "F7")
async def test_while_two_models_are_ready(scene: Scene, record_property: Callable[[str, object], None]) -> None:
    async with await scene.launch() as plugin:
        await plugin.start_engine()
        await asyncio.gather(plugin.load_model("tiny-chat-gguf"), plugin.load_model("tiny-embed-gguf"))
        assert len(scene.family()) == 7, "the plugin, and two of guard, engine, its child"
        began = time.monotonic()
        kill(plugin)
        await scene.gone()
        took = time.monotonic() - began
        record_property("kill_ms", round(took * 1000, 1))
        print(f"kill -9 of the plugin: nothing left after {took * 1000:.0f} ms")


@pytest.mark.promise("F5", "F7")
async def test_in_the_middle_of_a_stream(scene: Scene) -> None:
    async with await scene.launch() as plugin:
        await plugin.start_engine()
        async with plugin.stream("chat", HELLO | {"max_tokens": -1}) as chunks:
            await anext(chunks)
            kill(plugin)
            await scene.gone()


@pytest.mark.promise("F5", "F7", "F17")
async def test_while_it_waits_for_an_engine_that_does_not_stop(scene: Scene) -> None:
    async with await scene.launch() as plugin:
        await plugin.start_engine()
        await plugin.load_model("tiny-chat-gguf")
        stopping = asyncio.create_task(plugin.stop_engine())
        await scene.fake.event("sigterm")
        kill(plugin)
        await scene.gone()
        await abandoned(stopping)


# The host is killed


@pytest.mark.promise("F3", "F5", "F7")
async def test_a_killed_host_takes_all_along(scene: Scene) -> None:
    """The plugin notices, and ends with its engine within its bound, although the engine obeys no SIGTERM."""
    import json

    host = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOST, json.dumps(HOSTED), str(scene.place)),
        env={**os.environ, **scene.env},
        stdout=subprocess.PIPE,
    )
    assert host.stdout is not None
    async with asyncio.timeout(LIMIT):
        plugin = int(await host.stdout.readline())
    assert plugin in {process.pid for process in scene.family()}
    assert len(scene.family()) == 5, "host, plugin, guard, engine, its child"
    host.kill()
    await host.wait()
    await scene.gone(3.0)


@pytest.mark.promise("U2")
@pytest.mark.parametrize("way", ["Shutdown", "the host is killed"])
async def test_an_engine_ends_with_a_plugin_that_can_create_no_thread(scene: Scene, way: str) -> None:
    import json

    scene.configure(stop_timeout=0.2)
    command = [sys.executable, "-c", THREADLESS]
    if way == "Shutdown":
        refused = asyncio.Event()
        hear = lambda line: refused.set() if "no threads" in line.message else None  # noqa: E731
        async with await launch(command, cwd=scene.place, env=scene.env, start_timeout=LIMIT, on_log=hear) as plugin:
            await plugin.start_engine()
            await plugin.load_model("tiny-chat-gguf")
            assert plugin.pid is not None
            os.kill(plugin.pid, signal.SIGUSR1)
            async with asyncio.timeout(LIMIT):
                await refused.wait()
            await plugin.kill()
            assert plugin.returncode == 0
            assert scene.records() == []
    else:
        host = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", HOST, json.dumps(command), str(scene.place)),
            env={**os.environ, **scene.env},
            stdout=subprocess.PIPE,
        )
        assert host.stdout is not None
        async with asyncio.timeout(LIMIT):
            pid = int(await host.stdout.readline())
        os.kill(pid, signal.SIGUSR1)
        host.kill()
        await host.wait()
    await scene.gone()


# A plugin comes back


@pytest.mark.promise("F7", "F11")
async def test_a_new_plugin_ends_what_a_killed_one_left(scene: Scene) -> None:
    """The guards are stopped, so that nobody ends the engines. Those of another plugin stay."""
    scene.configure(stop_timeout=0.2)
    async with await scene.launch() as other, await scene.launch() as plugin:
        for each in (other, plugin):
            await each.start_engine()
            await each.load_model("tiny-chat-gguf")
        [guard] = psutil.Process(plugin.pid).children()
        left = [guard, *guard.children(recursive=True)]
        assert len(left) == 3
        guard.suspend()
        kill(plugin)
        await scene.until(lambda: guard.ppid() != plugin.pid)
        others = [process for process in scene.family() if process not in left]
        assert len(others) == 4, "the other plugin, its guard, engine, and the engine's child"
        assert set(left) <= set(scene.family()), "they live on"
        assert len(scene.records()) == 2
        async with await scene.launch() as successor:
            await successor.start_engine()
            assert not set(left) & set(scene.family())
            assert set(others) <= set(scene.family())
            assert len(scene.records()) == 1
            assert await other.running_models()
            assert (await other.invoke("chat", HELLO | {"max_tokens": 2}))["choices"]


@pytest.mark.promise("F11", "P11")
async def test_an_engine_that_is_not_ours_is_left_alone(scene: Scene) -> None:
    """The same program with the same arguments, but somebody else has started it: its process, port and socket."""
    scene.configure(stop_timeout=0.2)
    async with await scene.launch() as plugin:
        await plugin.start_engine()
        await plugin.load_model("tiny-chat-gguf")
        [engine] = psutil.Process(plugin.pid).children()[0].children()
        command = engine.cmdline()
        key = scene.place / "key"
        key.write_text("somebody's\n")
        socket = scene.place / "their.sock"
        for option, value in (("--api-key-file", str(key)), ("--host", str(socket))):
            command[command.index(option) + 1] = value
        theirs = await asyncio.create_subprocess_exec(*command, env={**os.environ, "ORPHANS_TEST": scene.mark})
        child: list[psutil.Process] = []
        try:
            await scene.until(socket.exists)
            child = psutil.Process(theirs.pid).children()
            assert len(child) == 1
            kill(plugin)
            async with await scene.launch() as successor:
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
            await scene.until(lambda: not set(child) & set(scene.family()))


@pytest.mark.promise("F11")
async def test_one_model_is_wholly_gone_before_the_next_is_loaded(scene: Scene) -> None:
    """Also its children elsewhere: their memory counts as well."""
    scene.configure(max_loaded_models=1, stop_timeout=0.1)
    gate = scene.fake.gate("loaded")
    life = {"grandchild": "own", "ignore_term": True}
    scene.fake.behave(life, tiny_embed_gguf=[{**life, "load_until": str(gate)}])
    async with await scene.launch() as plugin:
        await plugin.start_engine()
        await plugin.load_model("tiny-chat-gguf")
        first = [process for process in scene.family() if process.pid not in (plugin.pid, os.getpid())]
        assert len(first) == 3, "guard, engine, its child"
        loading = asyncio.create_task(plugin.load_model("tiny-embed-gguf"))
        await scene.fake.event("started", model="tiny-embed-gguf")
        assert not set(first) & set(scene.family())
        gate.touch()
        await loading
