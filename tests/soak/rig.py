"""The plugin under test under its host, observations from outside, and the cleanup."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
import tempfile
import uuid
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.host import LogLine, PluginClient, launch
from engine_plugin.process import guard
from tests.engines.llamacpp.running import ENDLESS, REPOSITORY, processes_of
from tests.fake_engine import FakeEngine
from tests.models.server import FileServer, file_server
from tests.patience import patience
from tests.shipped import shipped, write_manifest
from tests.soak import timed_engine
from tests.soak.watched_plugin import SOCKET_VARIABLE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

__all__ = [
    "CHAT_MODELS",
    "FLOOD",
    "MARK",
    "Hosted",
    "Log",
    "Observer",
    "Rig",
    "Snapshot",
    "launched",
    "left_behind",
    "rig",
    "sweep",
]

MARK = "ENGINE_PLUGIN_SOAK"
CHAT_MODELS = ("tiny-chat-gguf", "tiny-random")
FLOOD = "flood"
"""A model that answers as fast as it is read."""

_LIMIT = patience(5)  # seconds for any single step of setting up and ending
_SETTLE = patience(2.5)
_LOOK = 0.25
_KEPT = 20
# One that is frozen while it starts shows no progress.
_EXPECTED_ERRORS = re.compile(
    r"llama\.cpp for [^\s:]+( (died|ended|hangs|cannot serve|did not)|: no sign of progress)"
    r"|\S+: \d+ requests did not"
)


@dataclass(slots=True)
class Snapshot:
    """The plugin at rest. Memory in bytes; `kinds` counts its live objects by type, `blocks` are those of Python's
    own memory, strings and numbers included."""

    rss: int
    fds: dict[str, int]
    children: int
    native_threads: int
    tasks: dict[str, int]
    threads: dict[str, int]
    objects: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    blocks: int = 0

    def calm(self, goal: Snapshot | None) -> bool:
        """Return whether no work is running; with a `goal`, none beyond it."""
        if self.children:
            return False
        return goal is None or (self.tasks == goal.tasks and self.fds == goal.fds)


class Log:
    """What the plugin writes."""

    def __init__(self, expected: re.Pattern[str] = _EXPECTED_ERRORS) -> None:
        self._expected = expected
        self.complaints: Counter[str] = Counter()
        """Errors that are none of an engine's."""
        self.restarts = 0
        """Restarts that the plugin makes by itself."""

    def take(self, line: LogLine) -> None:
        """The next line."""
        if "restarting in" in line.message:
            self.restarts += 1
        wrong = line.level == "error" and not self._expected.match(line.message)
        if wrong or "exception" in line.kv or "Warning" in line.message or line.message.startswith("Traceback"):
            text = f"{line.message} {line.kv.get('exception', '')}".strip()
            if text in self.complaints or len(self.complaints) < _KEPT:
                self.complaints[text] += 1


class Observer:
    """Observes a process from outside, and from inside by its socket."""

    def __init__(self, process: psutil.Process, socket: Path) -> None:
        self.process = process
        self._socket = socket
        self._asking = asyncio.Lock()
        self._link: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def where(self) -> list[str]:
        """Return what each of its tasks waits for."""
        chains: list[str] = (await self._ask("where"))["where"]
        return chains

    async def look(self, *, deep: bool = False) -> Snapshot:
        """Take a snapshot."""
        inside = await self._ask("deep" if deep else "brief")
        return Snapshot(
            rss=self.process.memory_info().rss,
            fds=_descriptors(self.process),
            children=len(self.process.children(recursive=True)),
            native_threads=self.process.num_threads(),
            **inside,
        )

    def close(self) -> None:
        """Disconnect."""
        if self._link is not None:
            self._link[1].close()

    async def _ask(self, question: str) -> dict[str, Any]:
        if self._link is None:
            self._link = await asyncio.open_unix_connection(self._socket, limit=1 << 24)
        reader, writer = self._link
        async with self._asking, asyncio.timeout(_LIMIT):
            writer.write(question.encode() + b"\n")
            answer: dict[str, Any] = json.loads(await reader.readline())
        return answer


class Hosted:
    """A launched plugin, whatever its engine."""

    def __init__(self, scratch: Path, mark: str, client: PluginClient, log: Log) -> None:
        """`scratch` has its plugin.yaml and all that it writes; whatever it starts bears the mark."""
        self.scratch = scratch
        self.client = client
        self.log = log
        self.mark = mark
        pid = client.pid
        if pid is None:
            raise RuntimeError("the plugin has no process")
        self.plugin = psutil.Process(pid)
        self._observer = Observer(self.plugin, scratch / "watch")

    async def where(self) -> list[str]:
        """What each of the plugin's tasks waits for."""
        return await self._observer.where()

    async def look(self, *, deep: bool = False) -> Snapshot:
        """Take a snapshot of the plugin."""
        return await self._observer.look(deep=deep)

    async def rest(self, goal: Snapshot | None = None) -> Snapshot:
        """Stop the engine and wait, not for ever, until the plugin is at rest, as in `goal`; see how it is then."""
        await self.client.stop_engine(timeout=_LIMIT)
        loop = asyncio.get_running_loop()
        give_up = loop.time() + _SETTLE
        before = await self.look()
        while loop.time() < give_up:
            await asyncio.sleep(_LOOK)
            now = await self.look()
            # The first time there is no goal: the plugin is at rest when nothing changes.
            if now.calm(goal or before):
                break
            before = now
        return await self.look(deep=True)

    async def end(self) -> list[str]:
        """End the plugin as a host does, and return what is left."""
        self._observer.close()
        await self.client.kill()
        return left_behind(self.client, self.mark, self.scratch)


class Rig(Hosted):
    """The llama.cpp plugin on the fake engine. Made by `rig`."""

    def __init__(
        self, scratch: Path, mark: str, client: PluginClient, fake: FakeEngine, files: FileServer, log: Log
    ) -> None:
        super().__init__(scratch, mark, client, log)
        self.fake = fake
        self.files = files

    def engines(self, *, guards: bool = False) -> list[tuple[psutil.Process, str]]:
        """The running engines, or their guards, and their models."""
        found = []
        for process in self.plugin.children(recursive=True):
            try:
                argv = process.cmdline()
            except psutil.Error:
                continue  # it has just gone
            if "--alias" in argv and (guard.__file__ in argv) is guards:
                found.append((process, argv[argv.index("--alias") + 1]))
        return found


def left_behind(client: PluginClient, mark: str, scratch: Path) -> list[str]:
    """Return what an ended plugin has left: processes, files, sockets."""
    left = [f"the plugin's exit status is {client.returncode}"] if client.returncode else []
    psutil.wait_procs(processes_of(mark, MARK), timeout=patience(0.1))
    left += [f"process {process.pid}" for process in processes_of(mark, MARK)]
    left += [f"temporary: {path.name}" for path in (scratch / "tmp").rglob("*")]
    data = scratch / "data"
    for pattern in ("run/*", "served/*", "models/.partial/*.part", "**/*.key", "**/*.sock"):
        left += [f"data: {path.relative_to(data)}" for path in data.glob(pattern)]
    return left


@asynccontextmanager
async def rig(engine: Mapping[str, Any], lifetime: float) -> AsyncIterator[Rig]:
    """A plugin with these engine options, its models pulled and its engine started. Leaves nothing behind, whatever
    the plugin left; engines live no longer than `lifetime` seconds."""
    scratch = Path(tempfile.mkdtemp(prefix="eps-"))
    mark = uuid.uuid4().hex
    log = Log()
    try:
        async with AsyncExitStack() as cleanup:
            files = await cleanup.enter_async_context(file_server(ENDLESS.read_bytes()))
            fake = _lay_out(scratch, engine, lifetime)
            client = await cleanup.enter_async_context(await launched(scratch, mark, log))
            made = Rig(scratch, mark, client, fake, files, log)
            await client.start_engine(timeout=_LIMIT)
            await client.pull_model(str(ENDLESS), timeout=_LIMIT)
            await client.pull_model(str(scratch / f"{FLOOD}.gguf"), timeout=_LIMIT)
            await client.pull_model(files.url("/far.gguf"), timeout=_LIMIT)  # what it imports, it imports now
            yield made
    finally:
        sweep(mark, scratch)


async def launched(scratch: Path, mark: str, log: Log, **environ: str) -> PluginClient:
    """The plugin of the plugin.yaml in `scratch`, with a socket for observers at `watch` there."""
    return await launch(
        [sys.executable, "-W", "always::ResourceWarning", "-m", "tests.soak.watched_plugin"],
        name="plugin",
        cwd=scratch,
        env={
            MARK: mark,
            SOCKET_VARIABLE: str(scratch / "watch"),
            "TMPDIR": str(scratch / "tmp"),
            "PYTHONPATH": str(REPOSITORY),
            **environ,
        },
        start_timeout=_LIMIT,
        on_log=log.take,
    )


def sweep(mark: str, scratch: Path) -> None:
    """Kill all processes of the soak and remove its files."""
    for process in processes_of(mark, MARK):
        process.kill()
    shutil.rmtree(scratch, ignore_errors=True)


def _lay_out(scratch: Path, engine: Mapping[str, Any], lifetime: float) -> FakeEngine:
    (scratch / "tmp").mkdir()
    shutil.copy(ENDLESS, scratch / f"{FLOOD}.gguf")
    fake = FakeEngine(scratch / "bin" / "llama-server", scratch / "bin" / "fake.json")
    timed_engine.install(fake.executable, fake.script, lifetime)
    fake.behave({})
    shape = shipped("llamacpp")
    shape["engine"] = {"name": "llamacpp", **fake.options, **engine}
    shape["resources"]["data_dir"] = str(scratch / "data")
    write_manifest(scratch, shape)
    return fake


def _descriptors(process: psutil.Process) -> dict[str, int]:
    """Open descriptors by kind; where the system does not tell, all together."""
    folder = Path(f"/proc/{process.pid}/fd")
    if not folder.is_dir():
        return {"descriptors": process.num_fds()}
    kinds: Counter[str] = Counter()
    for entry in folder.iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue
        kinds[_kind(target)] += 1
    return dict(kinds)


def _kind(target: str) -> str:
    for start, kind in (("socket:", "sockets"), ("pipe:", "pipes"), ("anon_inode:", "events")):
        if target.startswith(start):
            return kind
    return "files"
