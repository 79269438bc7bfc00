"""The Ollama plugin under test with a managed or attached server, and observations of both."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
import uuid
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import psutil

from engine_plugin.process import guard
from tests.engines.llamacpp.running import ENDLESS, REPOSITORY, processes_of
from tests.engines.ollama.contract.handle import ContractClient, ContractServer
from tests.engines.ollama.contract.library import MODELS, Library, Model
from tests.engines.ollama.contract.release import write_program
from tests.engines.openvino.driver.running import tone
from tests.patience import patience
from tests.shipped import shipped, write_manifest
from tests.soak.rig import MARK, Hosted, Log, launched, sweep

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from engine_plugin.host import PluginClient

__all__ = ["FAULTS", "GOOD", "Life", "OllamaRig", "Theirs", "ollama_rig"]

Life: TypeAlias = Literal["managed", "attached", "openai"]
"""With a managed Ollama, an attached Ollama, and an attached server with OpenAI's REST API."""

GOOD = ("tiny-chat", "think:8b", "tools:7b", "fault-slow", "fault-crumbs", "fault-burst", "fault-last-words")
"""Models that answer to the last word, each in its own way."""
FAULTS = {
    "fault-error": 502,
    "fault-no-done": 502,
    "fault-cut": 502,
    "fault-garbage": 502,
    "fault-html": 502,
    "fault-crashed": 502,
    "fault-loading": 502,
    "fault-busy": 503,
    "fault-canceled": 503,
    "fault-memory": 412,
    "fault-gateway": 502,
    "fault-sign-in": 401,
    "fault-forbidden": 412,
    "fault-context": 400,
}
"""Models that fail, and the error code of the call."""

_WAITING = ("fault-stall", "fault-silent", "fault-endless")
_FLAVOURS: dict[Life, dict[str, str]] = {
    "managed": {"chat": "ollama:chat", "generate": "openvino:generate", "embed": "ollama:embed"},
    "attached": {"chat": "openai:chat", "generate": "ollama:generate", "embed": "openvino:embed"},
    "openai": {},
}
_OPTIONS: dict[Life, dict[str, object]] = {
    "managed": {
        "server": "manage",
        "drain_timeout": 2,
        "start_timeout": 20,
        "stop_timeout": 1,
        "health_interval": 0.5,
        "hung_timeout": 3,
        "restart_limit": 1000,
        "restart_backoff": 0.05,
        "stable_time": 1,
    },
    "attached": {"drain_timeout": 2},
    "openai": {"connect_backoff": 0.02},
}
_LIMIT = patience(5)  # seconds for any single step of setting up and ending
_EXPECTED_ERRORS = re.compile(
    r"the managed Ollama server( (died|ended|hangs|cannot serve|did not)|: no sign of progress)"
)


class Theirs:
    """An attached Ollama, restarted on the same port."""

    def __init__(self, folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.port = 0
        self._folder = folder
        self._server: ContractServer | None = None

    @property
    def process(self) -> psutil.Process:
        """The server. Raises psutil.NoSuchProcess between two lives."""
        if self._server is None:
            raise psutil.NoSuchProcess(0)
        return psutil.Process(self._server.process.pid)

    def all(self) -> list[psutil.Process]:
        """The server and the processes that hold its models."""
        return processes_of(self.mark, MARK)

    async def start(self) -> None:
        """Start the server again."""
        environ = {MARK: self.mark}
        starting = asyncio.ensure_future(
            asyncio.to_thread(ContractServer, self._folder, "--runners", environ=environ, port=self.port)
        )
        try:
            self._server = await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._server = await starting
            raise
        self.port = self._server.port

    async def die(self) -> None:
        """Kill the server with its children."""
        server, self._server = self._server, None
        if server is not None:
            server.process.kill()  # first, lest it start one more
            for process in self.all():
                with suppress(psutil.Error):
                    process.kill()
            await asyncio.to_thread(server.close)


class TheirOpenAI(Theirs):
    """An attached server with OpenAI's REST API."""

    def __init__(self) -> None:
        super().__init__(Path())
        self._program: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> psutil.Process:
        if self._program is None:
            raise psutil.NoSuchProcess(0)
        return psutil.Process(self._program.pid)

    async def start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self._program = program = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.soak.openai_server", str(self.port)),
            stdin=pipe,
            stdout=pipe,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=REPOSITORY,
            env=os.environ | {MARK: self.mark},
        )
        if program.stdout is None:
            raise RuntimeError("the server has no output")
        self.port = int(await program.stdout.readline())

    async def die(self) -> None:
        program, self._program = self._program, None
        if program is not None:
            program.kill()
            await program.communicate()


class OllamaRig(Hosted):
    """A launched plugin with a managed or attached server. Made by `ollama_rig`."""

    def __init__(self, scratch: Path, mark: str, client: PluginClient, log: Log, life: Life, theirs: Theirs) -> None:
        super().__init__(scratch, mark, client, log)
        self.life = life
        self.theirs = theirs
        """With `managed`, a server that the plugin must not use."""

    async def contract(self) -> ContractClient:
        """Return the server in use. Raises EnginePluginError while there is none."""
        if self.life != "managed":
            return ContractClient(self.theirs.port)
        host = (await self.client.get_config())["host"]
        return ContractClient(int(host.rpartition(":")[2] or 0))

    def server(self, *, guards: bool = False) -> psutil.Process | None:
        """The process of the server that is used, or of its guard, if there is one."""
        with suppress(psutil.Error):
            if self.life != "managed":
                return self.theirs.process
            for process in self.plugin.children(recursive=True):
                argv = process.cmdline()
                if argv[-1:] == ["serve"] and (guard.__file__ in argv) is guards:
                    return process
        return None

    def runners(self) -> list[psutil.Process]:
        """The processes that hold models."""
        with suppress(psutil.Error):
            server = self.server()
            return server.children() if server else []
        return []

    async def anew(self, number: int) -> OllamaRig:
        """A new plugin in the place of one that is gone, with a folder for temporary files of its own."""
        environ = environment(self.scratch, self.theirs, number)
        client = await launched(self.scratch, self.mark, self.log, **environ)
        return OllamaRig(self.scratch, self.mark, client, self.log, self.life, self.theirs)


def environment(scratch: Path, theirs: Theirs, number: int = 0) -> dict[str, str]:
    """Return the plugin's environment, always with the address of an attached server."""
    folder = scratch / ("tmp" if not number else f"tmp{number}")
    folder.mkdir(exist_ok=True)
    return {"TMPDIR": str(folder), "OLLAMA_HOST": f"127.0.0.1:{theirs.port}"}


@asynccontextmanager
async def ollama_rig(life: Life, engine: Mapping[str, Any]) -> AsyncIterator[OllamaRig]:
    """A plugin with these engine options, its engine started. Leaves nothing behind, whatever the plugin left."""
    scratch = Path(tempfile.mkdtemp(prefix="eps-"))
    mark = uuid.uuid4().hex
    log = Log(_EXPECTED_ERRORS)
    theirs = TheirOpenAI() if life == "openai" else Theirs(scratch / "theirs")
    try:
        async with AsyncExitStack() as cleanup:
            for folder in (scratch / "theirs", scratch / "data" / "models"):
                _fill(folder)
            cleanup.push_async_callback(theirs.die)
            await theirs.start()
            _lay_out(scratch, life, engine, theirs)
            client = await launched(scratch, mark, log, **environment(scratch, theirs))
            await cleanup.enter_async_context(client)
            await client.start_engine(timeout=_LIMIT)
            await _prime(client, life)
            yield OllamaRig(scratch, mark, client, log, life, theirs)
    finally:
        sweep(theirs.mark, scratch)
        sweep(mark, scratch)


async def _prime(client: PluginClient, life: Life) -> None:
    """What is imported when it is needed is imported now."""
    if life != "openai":
        await client.pull_model("from-a-file", source=str(ENDLESS), timeout=_LIMIT)
        await client.delete_model("from-a-file", timeout=_LIMIT)
    await client.invoke("speech-to-text", {"audio": tone(0.2)}, timeout=_LIMIT)
    async with client.invoke_bidi("speech-to-text-ws", timeout=_LIMIT) as talk:
        await talk.send(bytes(8_000), metadata={"format": "pcm"})
        await talk.done_sending()
        async for _ in talk:
            pass


def _fill(folder: Path) -> None:
    library = Library(folder, MODELS)
    for name in (*GOOD, *FAULTS, *_WAITING):
        if name.startswith("fault-"):
            library.add(Model(f"{name}:latest"))


def _lay_out(scratch: Path, life: Life, engine: Mapping[str, Any], theirs: Theirs) -> None:
    options = {**_OPTIONS[life], **engine}
    if life == "managed":
        options["ollama"] = str(write_program(scratch / "bin", "--runners"))
    plugin = "openai" if life == "openai" else "ollama"
    shape = shipped(plugin)
    if life == "openai":
        shape["provider"]["engine_host"] = f"http://127.0.0.1:{theirs.port}/v1"
    shape["engine"] |= options
    for service in shape["services"]:
        service["config_ref"] = _FLAVOURS[life].get(service["service_name"], service["config_ref"])
    shape["resources"]["data_dir"] = str(scratch / "data")
    write_manifest(scratch, shape)
