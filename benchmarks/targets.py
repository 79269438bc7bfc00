"""The two ways to an engine that are compared: straight to it, and through the plugin.

Each way has an engine process of its own, started by the same code with the same settings, so that neither disturbs
the other; only one at a time is given work. The direct way uses the plugin's own HTTP client.
"""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from benchmarks.dialects import OPENAI
from benchmarks.results import DIRECT, PLUGIN
from engine_plugin.engines.llamacpp.models import model_store
from engine_plugin.engines.llamacpp.options import LlamaCppOptions
from engine_plugin.engines.llamacpp.server import LlamaCppServer
from engine_plugin.engines.llamacpp.software import LlamaCppSoftware
from engine_plugin.engines.local.server import Place
from engine_plugin.engines.options import read_options
from engine_plugin.host import launch
from engine_plugin.manifest import load_manifest
from engine_plugin.process.records import ProcessRecords
from engine_plugin.transport import sse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from benchmarks.dialects import Dialect
    from engine_plugin.host import PluginClient
    from engine_plugin.manifest import Manifest

__all__ = [
    "COMMAND",
    "MODEL",
    "MODEL_FILE",
    "REPOSITORY",
    "Measured",
    "Plugged",
    "Rig",
    "Target",
    "rig",
    "stand_in",
    "write_plugin",
]

REPOSITORY = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, "-m", "engine_plugin.app")
MODEL, EMBEDDER = "tiny-random", "tiny-embed-gguf"
MODEL_FILE = REPOSITORY / "tests" / "data" / "gguf" / f"{MODEL}.gguf"
_ANSWER_LIMIT = 64 * 1024 * 1024
_START_TIMEOUT = 30.0


class Target(Protocol):
    """One way to an engine."""

    name: str

    async def call(self, service: str, body: bytes) -> bytes:
        """Send a request and read its whole answer."""

    def stream(self, body: bytes) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Stream a chat in blocks of whole events."""


class Measured(Target, Protocol):
    """One that is compared with another."""

    dialect: Dialect

    def chat(self, tokens: int, *, stream: bool = True, **more: float | str) -> bytes:
        """A chat request for exactly that many tokens; see Dialect."""

    async def nothing(self) -> None:
        """Ask for the least that can be asked for."""


class Direct:
    """Straight to llama.cpp's HTTP server."""

    name = DIRECT
    dialect = OPENAI

    def __init__(self, servers: Mapping[str, LlamaCppServer]) -> None:
        """`servers` by service."""
        self._servers = servers

    def chat(self, tokens: int, *, stream: bool = True, **more: float | str) -> bytes:
        return self.dialect.chat(MODEL, tokens, stream=stream, **more)

    async def nothing(self) -> None:
        async with self._servers["chat"].http().request("GET", "/health") as response:
            await response.read(_ANSWER_LIMIT)

    async def call(self, service: str, body: bytes) -> bytes:
        async with self._servers[service].post(service, body) as response:
            return await response.read(_ANSWER_LIMIT)

    @asynccontextmanager
    async def stream(self, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._servers["chat"].post("chat", body) as response:
            yield sse.whole_events(response)


class Plugged:
    """Through a plugin, as a host in Python calls it. `client` is also for its other rpcs and its pid."""

    def __init__(
        self, client: PluginClient, dialect: Dialect = OPENAI, model: str = MODEL, name: str = PLUGIN
    ) -> None:
        """`dialect` is what its chat service speaks."""
        self.name = name
        self.client = client
        self._model = model
        self.dialect = dialect

    def chat(self, tokens: int, *, stream: bool = True, **more: float | str) -> bytes:
        return self.dialect.chat(self._model, tokens, stream=stream, **more)

    async def nothing(self) -> None:
        await self.client.get_operate_status()

    async def call(self, service: str, body: bytes) -> bytes:
        return await self.client.invoke_raw(service, body)

    def stream(self, body: bytes) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self.client.stream("chat", body)


@dataclass(frozen=True, slots=True)
class Rig:
    """All ways to one kind of engine, ready. The first plugin is ours. `embedder` is a model for embeds, if any."""

    direct: Measured
    plugins: tuple[Plugged, ...]
    embedder: str = ""

    @property
    def ways(self) -> tuple[str, ...]:
        return tuple(target.name for target in self.targets(0))

    def targets(self, turn: int) -> Sequence[Measured]:
        """All of them, another one first in each round."""
        targets = (self.direct, *self.plugins)
        at = turn % len(targets)
        return targets[at:] + targets[:at]


def write_plugin(
    folder: Path, engine: Mapping[str, Any], *, base: str = "llamacpp", refs: Mapping[str, str] = MappingProxyType({})
) -> Path:
    """A plugin.yaml in `folder`: that of the plugin `base`, with these engine options. Returns the file.

    Another engine than llama.cpp is among them as `name`. `refs` are the config_ref of some services.
    """
    shape = yaml.safe_load((REPOSITORY / f"plugins/{base}/plugin.yaml").read_text(encoding="utf-8"))
    shape["engine"] = {"name": "llamacpp", **engine}
    for service in shape["services"]:
        service["config_ref"] = refs.get(service["service_name"], service["config_ref"])
    shape["resources"]["data_dir"] = str(folder / "data")
    folder.mkdir(parents=True)
    file = folder / "plugin.yaml"
    file.write_text(yaml.safe_dump(shape), encoding="utf-8")
    return file


def stand_in(folder: Path) -> str:
    """An executable that runs `benchmarks.upstream`, for the engine option `llama_server`."""
    script = Path(__file__).with_name("upstream.py")
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        file = folder / "llama-server.cmd"
        file.write_text(f'@"{sys.executable}" "{script}" %*\n')
    else:
        file = folder / "llama-server"
        file.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
        file.chmod(0o700)
    return str(file)


@asynccontextmanager
async def rig(folder: Path, sockets: Path, engine: Mapping[str, Any]) -> AsyncIterator[Rig]:
    """Both ways to an engine with these options, its models loaded. Ends all processes when left.

    `sockets` is a private directory with a short path.
    """
    manifest = load_manifest(write_plugin(folder, engine))
    embedder = "" if "llama_server" in engine else EMBEDDER
    names = {"chat": MODEL, **({"embed": embedder} if embedder else {})}
    async with AsyncExitStack() as cleanup:
        client = await launch(COMMAND, name="plugin", cwd=folder, start_timeout=_START_TIMEOUT)
        await cleanup.enter_async_context(client)
        await client.start_engine()
        await client.pull_model(str(MODEL_FILE))
        for name in names.values():
            await client.load_model(name)
        servers = await _servers(manifest, names, sockets, cleanup)
        yield Rig(Direct(servers), (Plugged(client),), embedder)


async def _servers(
    manifest: Manifest, names: Mapping[str, str], sockets: Path, cleanup: AsyncExitStack
) -> dict[str, LlamaCppServer]:
    """The engine once more, by the code that the plugin runs it with, in our own hands."""
    environ = dict(os.environ)
    options = read_options(LlamaCppOptions, manifest)
    software = LlamaCppSoftware(options, manifest.data_dir, environ)
    store = model_store(manifest.data_dir / "models", software)
    cleanup.push_async_callback(store.aclose)
    servers = {}
    for service, name in names.items():
        folder = None if sys.platform == "win32" else sockets
        server = LlamaCppServer(
            await store.get(name),
            software.find(),
            options,
            Place(ProcessRecords(manifest.data_dir / "direct"), environ, folder),
            options.gpu_layers,
            lambda _model, _capabilities: None,
        )
        cleanup.push_async_callback(server.close)
        await server.ensure_ready()
        servers[service] = server
    return servers
