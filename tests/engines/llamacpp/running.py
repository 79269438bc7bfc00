"""A plugin with its engine, and their processes."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.host.channel import open_channel
from engine_plugin.host.link import Link
from engine_plugin.templates.renderer import PROGRAM
from tests.patience import patience

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from engine_plugin.engines.llamacpp.engine import LlamaCppEngine
    from engine_plugin.engines.llamacpp.server import LlamaCppServer
    from engine_plugin.host import PluginClient
    from engine_plugin.plugin import Plugin

__all__ = [
    "ENDLESS",
    "ENGINE_MARK",
    "HELLO",
    "MARK",
    "REPOSITORY",
    "RunningPlugin",
    "eventually",
    "gone",
    "processes_of",
]

REPOSITORY = Path(__file__).parents[3]
MARK = "ENGINE_PLUGIN_TEST_RUN"
ENGINE_MARK = "ENGINE_PLUGIN_TEST_ENGINE"
ENDLESS = REPOSITORY / "tests" / "data" / "gguf" / "tiny-random.gguf"
"""A chat model whose answers never end by themselves."""

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def processes_of(value: str, variable: str = MARK) -> list[psutil.Process]:
    """The other processes with this value of `variable` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                found.append(process)
        except (psutil.Error, OSError):  # it has exited, or belongs to another user
            continue
    return found


def gone(process: psutil.Process) -> bool:
    """Whether a process, possibly an orphan, has ended. Not every container's init reaps at once."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def eventually(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 10.0) -> None:
    """Poll for a state of another process, for which there is no event."""
    async with asyncio.timeout(patience(seconds)):
        while True:
            met = condition()
            if met is True or (isinstance(met, Awaitable) and await met):
                return
            await asyncio.sleep(0.003)


@dataclass(frozen=True)
class RunningPlugin:
    """One plugin and a client of it."""

    plugin: Plugin
    engine: LlamaCppEngine
    client: PluginClient
    address: str
    mark: str
    """The value of ENGINE_MARK in the environment of its engine's processes."""

    def processes(self) -> list[psutil.Process]:
        """The engine's processes."""
        return processes_of(self.mark, ENGINE_MARK)

    @asynccontextmanager
    async def link(self) -> AsyncIterator[Link]:
        """A connection to the plugin for single messages, which may be invalid."""
        channel = open_channel(self.address)
        try:
            yield Link("llamacpp", self.address, channel, None)
        finally:
            await channel.close()

    def servers(self) -> list[psutil.Process]:
        """The processes that serve a model, without those that render chat templates."""
        return [process for process in self.processes() if PROGRAM not in process.cmdline()]

    def server(self, model: str) -> LlamaCppServer:
        """The server of a loaded model."""
        [server] = [server for server in self.engine.pool.all_servers() if server.model.name == model]
        return server

    async def engine_pid(self, model: str) -> int:
        """The process of a loaded model."""
        pid = self.server(model).pid
        assert pid is not None
        return pid

    async def direct(self, model: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request to the engine directly, not through the plugin."""
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        async with self.server(model).http().request(method, path, data) as response:
            answer = await response.read(64 << 20)
            assert response.status == 200, answer
        return json.loads(answer)

    async def busy(self, model: str) -> bool:
        """Whether the engine is computing."""
        return any(slot["is_processing"] for slot in await self.direct(model, "/slots"))

    async def until_idle(self, model: str) -> None:
        """Wait until the engine has no running requests."""

        async def idle() -> bool:
            return not await self.busy(model)

        await eventually(idle)

    async def until_busy(self, model: str) -> None:
        """Wait until the engine computes."""
        await eventually(lambda: self.busy(model))

    async def loaded(self) -> list[str]:
        """The names in GetRunningModels."""
        return sorted(model["name"] for model in await self.client.running_models())
