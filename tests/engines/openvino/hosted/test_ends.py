"""No end of the default plugin leaves a process or a file, whatever it was doing, and the next start works.

A host's end of standard input is no sign (G9): each plugin here has had an empty one from the beginning.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import EnginePluginError
from engine_plugin.host import connect
from tests.engines.llamacpp.running import eventually
from tests.hosted_at_pace import HOSTED
from tests.patience import LIMIT

from .work import CHAT, busy, stalled_hub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from engine_plugin.host import PluginClient

    from .scene import HostedScene

pytestmark = pytest.mark.slow

AT_ONCE = 1.5  # seconds at rest; it takes some 30 ms
IN_ORDER = 3.0  # seconds at rest, of which the plugin's own end takes less than 1.6

HOST = """\
import asyncio, json, sys
from pathlib import Path
from engine_plugin.host import launch
async def main():
    plugin = await launch(json.loads(sys.argv[1]), cwd=Path(sys.argv[2]))
    print(plugin.pid, plugin.address, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


class Hosted:
    """A plugin, a client of it, and the process of its host, if that is not ours."""

    def __init__(self, client: PluginClient, pid: int, host: asyncio.subprocess.Process | None = None) -> None:
        self.client = client
        self.pid = pid
        self.host = host

    async def end(self, how: str) -> None:
        """One of the ways in which a plugin ends."""
        if how == "killed":
            os.kill(self.pid, signal.SIGKILL)
        elif how == "terminated":
            os.kill(self.pid, signal.SIGTERM)
        elif how == "shut down":
            await self.client.shutdown()
        else:
            assert self.host is not None
            self.host.kill()
            await self.host.wait()


@asynccontextmanager
async def hosted(scene: HostedScene, *, by_another: bool = False) -> AsyncIterator[Hosted]:
    """A plugin that this process hosts, or that another one does."""
    if not by_another:
        async with await scene.launch() as plugin:
            assert plugin.pid is not None
            yield Hosted(plugin, plugin.pid)
        return
    command = (sys.executable, "-c", HOST, json.dumps(HOSTED), str(scene.place))
    host = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **scene.env}, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert host.stdout is not None
        async with asyncio.timeout(LIMIT):
            pid, address = (await host.stdout.readline()).split()
        async with await connect(address.decode()) as plugin:
            yield Hosted(plugin, int(pid), host)
    finally:
        if host.returncode is None:
            host.kill()
            await host.wait()


async def ended(call: asyncio.Task[Any]) -> None:
    """A call on a plugin that has ended raises one of this package's errors."""
    async with asyncio.timeout(LIMIT):
        with pytest.raises(EnginePluginError):
            await call


async def next_start_works(scene: HostedScene) -> None:
    """Another plugin starts over the same data, answers, and removes what a killed one had left."""
    scene.age()
    async with await scene.launch() as plugin:
        await plugin.start_engine()
        assert len([path for path in (scene.data / "served").iterdir() if path.is_dir()]) == 1, "its own"
        assert len(list((scene.data / "run").glob("*.json"))) == 1
        assert len(list(scene.temporary.iterdir())) == 2, "its socket's and its engine's directories"
        assert (await plugin.invoke("chat", CHAT))["choices"]
    await scene.gone(IN_ORDER)
    assert scene.left() == []


WAYS = ["killed", "host killed", "terminated", "shut down"]


@pytest.mark.promise("F3", "F5", "F7", "G20", "G33", "G36")
@pytest.mark.parametrize(
    "how", ["killed", "host killed", "shut down", pytest.param("terminated", marks=pytest.mark.thorough)]
)
async def test_end_of_a_busy_plugin_leaves_nothing(scene: HostedScene, how: str) -> None:
    async with stalled_hub() as hub:
        scene.env["HF_ENDPOINT"] = hub.url("").rstrip("/")
        async with hosted(scene, by_another=how == "host killed") as plugin:
            await plugin.client.start_engine()
            async with busy(plugin.client, hub) as calls:
                loading = asyncio.create_task(plugin.client.load_model("tiny-embed"))
                await eventually(lambda: len(scene.workers()) == 4)
                assert [name for name, call in calls.items() if call.done()] == []
                assert not loading.done()
                assert len(scene.family("speech.decoder_program")) == 1
                assert len(scene.family("openvino_server.grammar_check")) == 1
                await plugin.end(how)
                await scene.gone(AT_ONCE if how == "killed" else IN_ORDER)
                for call in (*calls.values(), loading):
                    await ended(call)
        if how == "killed":
            assert {name.partition("/")[0] for name in scene.left()} == {"data", "tmp"}
        else:
            assert scene.left() == []
    if how == "killed":
        await next_start_works(scene)


@pytest.mark.promise("F5", "F7", "F16", "G34")
@pytest.mark.parametrize(
    ("how", "phase"), [("killed", "probe"), ("shut down", "probe"), *((how, "serve") for how in WAYS)]
)
async def test_end_of_a_starting_plugin_leaves_nothing(scene: HostedScene, how: str, phase: str) -> None:
    """During the trial of the software, and during the start of the server."""
    async with hosted(scene, by_another=how == "host killed") as plugin:
        starting = asyncio.create_task(plugin.client.start_engine())
        await eventually(lambda: bool(scene.family(phase)))
        assert not starting.done()
        await plugin.end(how)
        await scene.gone(AT_ONCE if how == "killed" else IN_ORDER)
        await ended(starting)
    if how != "killed":
        assert scene.left() == []
