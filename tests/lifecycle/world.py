"""A plugin with a fake engine, and another server that takes its port."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.engines.llamacpp.engine import LlamaCppEngine
from engine_plugin.host import PluginClient, connect
from engine_plugin.manifest import load_manifest
from engine_plugin.plugin import Plugin
from engine_plugin.server import new_server
from engine_plugin.server.servicer import provider_service
from tests.engines.llamacpp.running import gone
from tests.fake_engine import FakeEngine
from tests.patience import LIMIT
from tests.shipped import shipped, write_manifest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from engine_plugin.engines.llamacpp.server import LlamaCppServer
    from engine_plugin.process.engine_process import ProcessState

__all__ = ["EMBED", "HELLO", "LIMIT", "Begin", "Stranger", "World", "dead", "port_of", "words"]

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
EMBED: dict[str, Any] = {"input": "Hello"}
# Quick where nothing is to be waited for.
SWIFT: dict[str, Any] = {"threads": 1, "stop_timeout": 2, "restart_backoff": 0.02, "drain_timeout": LIMIT}


@dataclass(frozen=True)
class World:
    """One plugin with a client, and its fake engine."""

    engine: LlamaCppEngine
    client: PluginClient
    fake: FakeEngine

    @property
    def life(self) -> int:
        """Return how many processes the driver has started, of all models."""
        return len(self.fake.events("started"))

    def processes(self) -> list[int]:
        """Return the processes that the fake engine reported and that still run."""
        events = self.fake.events("started") + self.fake.events("grandchild")
        return [pid for event in events if not dead(pid := event.get("child", event["pid"]))]

    def server(self, model: str = "tiny-chat-gguf") -> LlamaCppServer:
        """The server of a model that is loaded, or is being loaded."""
        [server] = [server for server in self.engine.pool.all_servers() if server.model.name == model]
        return server

    def users(self, model: str = "tiny-chat-gguf") -> int:
        """Return how many requests use the model or wait for it."""
        return self.engine.pool.users(model)

    async def loaded(self) -> list[str]:
        """The names in GetRunningModels."""
        return sorted(model["name"] for model in await self.client.running_models())

    def state(self, model: str = "tiny-chat-gguf") -> ProcessState:
        """Return the state of the model's process."""
        return self.server(model).state

    async def chat(self) -> str:
        """One whole answer."""
        answer = await self.client.invoke("chat", HELLO, timeout=LIMIT)
        text: str = answer["choices"][0]["message"]["content"]
        return text

    async def stream(self, into: list[bytes] | None = None) -> bytes:
        """Read one whole stream; its events are also added to `into`."""
        got = [] if into is None else into
        async with self.client.stream("chat", HELLO, timeout=LIMIT) as chunks:
            async for chunk in chunks:
                got.append(chunk)
        return b"".join(got)

    async def health(self) -> str:
        """Return the message of HealthCheck."""
        return await self.client.health_check()

    def leftovers(self) -> list[object]:
        """Processes, sockets, keys and records of the engine that are still there."""
        data = self.engine.data
        places = [data] if self.engine.sockets is None else [data, self.engine.sockets]
        files = [path for place in places for kind in ("*.key", "*.sock") for path in place.rglob(kind)]
        return [*self.processes(), *files, *(data / "run").glob("*.json")]


class Begin:
    """Starts plugins in this process and ends them; afterwards nothing may be left of any."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._stack = AsyncExitStack()
        self._worlds: list[World] = []

    async def __call__(
        self, *lives: dict[str, Any], of: dict[str, list[dict[str, Any]]] | None = None, **options: Any
    ) -> World:
        """A started plugin. `lives` is the fake engine's script, `of` that of some models; `options` go to the
        manifest's `engine:` section."""
        place = self._root / str(len(self._worlds))
        fake = FakeEngine.install(place / "bin")
        fake.behave(*lives, **(of or {}))
        shape = shipped("llamacpp")
        shape["engine"] |= SWIFT | fake.options | options
        shape["resources"]["data_dir"] = str(place / "data")
        write_manifest(place, shape)
        manifest = load_manifest(place / "plugin.yaml")
        engine = LlamaCppEngine(manifest)
        plugin = Plugin(manifest, engine)
        self._stack.push_async_callback(plugin.aclose)
        server = new_server()
        server.add(provider_service(plugin))
        address = await server.start(f"unix:{place / 's'}")
        self._stack.push_async_callback(server.stop, 0)
        client: PluginClient = await self._stack.enter_async_context(await connect(address))
        world = World(engine, client, fake)
        self._worlds.append(world)
        await client.start_engine()
        return world

    async def end(self) -> None:
        """Close all, and check that nothing is left."""
        await self._stack.aclose()
        left = {str(world.fake.script): world.leftovers() for world in self._worlds}
        for pid in (pid for world in self._worlds for pid in world.processes()):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._root)
        assert not any(left.values()), left


class Stranger:
    """Another server on a port: answers every request with the same status and records the requests."""

    def __init__(self, status: int = 200) -> None:
        self._status = status
        self.heard = bytearray()
        self.asked = asyncio.Event()

    @asynccontextmanager
    async def at(self, port: int) -> AsyncIterator[Stranger]:
        """Listen for the length of the block."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.heard += data
                self.asked.set()
                writer.write(b'HTTP/1.1 %d -\r\ncontent-length: 15\r\n\r\n{"status":"ok"}' % self._status)
        except ConnectionError:
            return
        finally:
            with suppress(ConnectionError):
                writer.close()


def port_of(started: dict[str, Any]) -> int:
    """Return the port in the arguments of a `started` event's process."""
    argv = started["argv"]
    return int(argv[argv.index("--port") + 1])


def dead(pid: int) -> bool:
    """Return whether no such process runs."""
    try:
        return gone(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def words(count: int) -> str:
    """Return the text of the fake engine with so many tokens."""
    return "".join(f"w{number} " for number in range(count))
