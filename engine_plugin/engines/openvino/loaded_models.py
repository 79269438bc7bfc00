"""The models that one server holds: its configuration, which is ours to write, and each model's state in it.

A server loads what its config.json names when it starts, and follows its changes when it is told to. So that is where
a model in memory has its being: `Residents` keeps the file and watches what becomes of it, `Resident` is one model as
the pool sees it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import quote

from engine_plugin.engines.local.single_flight import SharedWork
from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    EngineStartError,
    ModelUnusableError,
    UnavailableError,
)
from engine_plugin.system.files import in_thread, private_folder, write_json, write_whole

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from filelock import BaseFileLock

    from engine_plugin.engines.local.admission import Admission
    from engine_plugin.engines.openvino.client import ServerClient
    from engine_plugin.models.store import StoredModel
    from engine_plugin.process.run import Life

__all__ = ["ModelState", "Resident", "ResidentServer", "Residents", "lock_of", "remove_stale"]

log = logging.getLogger(__name__)

_GRAPH = "graph.pbtxt"
_CONFIG_LIMIT = 16 * 1024 * 1024
_POLL_FIRST, _POLL_LAST = 0.01, 0.25
_LEAVE_TIMEOUT = 30.0
_NO_LOCK = (OSError, NotImplementedError)
"""Somebody has it (filelock's Timeout is an OSError), or the file system knows no locks."""


class ModelState(NamedTuple):
    """What the server says of a model: OVMS's word for it, what is wrong, and whether it will not come; and the bytes
    of memory that it takes, 0 where the server does not tell."""

    state: str
    complaint: str
    failed: bool
    memory: int = 0
    unusable: bool = False
    """Whether it failed because of its files, so that another attempt would fail as well."""


class ResidentServer(Protocol):
    """The server that `Residents` and each `Resident` talk to."""

    @property
    def life(self) -> Life | None:
        """Its present life, by which what it holds in memory lasts."""

    @property
    def ready(self) -> bool:
        """Whether it serves."""

    @property
    def dead(self) -> bool:
        """Whether it is not there and will not come unless somebody asks."""

    @property
    def crashed(self) -> bool:
        """Whether it served and died, and has not proved itself since."""

    def client(self) -> ServerClient:
        """A client of its present life. Raises UnavailableError when it is not up."""

    def last_words(self) -> str:
        """What it logged last."""

    async def ensure_ready(self) -> None:
        """Start it if need be. Raises EngineStartError, and UnavailableError when it was closed."""

    async def recovered(self) -> None:
        """Wait while it is being started or restarted."""


def remove_stale(folder: Path) -> None:
    """Remove what plugins that were killed left of their servers' folders below `folder`. Blocks."""
    for place in folder.iterdir() if folder.is_dir() else ():
        server = place.with_suffix("")  # a folder, or the lock of one
        lock = lock_of(server)
        try:
            lock.acquire(timeout=0)
        except _NO_LOCK:
            continue  # its plugin lives, or nobody can tell
        shutil.rmtree(server, ignore_errors=True)
        _unlock(lock)


def lock_of(folder: Path) -> BaseFileLock:
    """The lock that the plugin of a server's folder holds. It lies beside it, and goes with the process."""
    from filelock import FileLock

    return FileLock(folder.with_suffix(".lock"), mode=0o600, thread_local=False)


def _unlock(lock: BaseFileLock) -> None:
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


class Residents:
    """config.json and graphs of one server, below `folder`, which is made and removed here, and locked between.

    A folder whose lock nobody holds was left by a plugin that was killed, wherever that ran.

    Each graph lies in a folder of its own, named anew when the graph changes: the model server looks for changes in
    config.json alone.
    """

    def __init__(self, folder: Path, server: ResidentServer, load_limit: float) -> None:
        self.folder = folder
        self._server = server
        self._load_limit = load_limit
        self._graphs: dict[str, str] = {}
        self._attempts = 0
        self._bases: dict[str, str] = {}
        self._proved: set[str] = set()
        self._writing = asyncio.Lock()
        self._lock: BaseFileLock | None = None

    @property
    def config(self) -> Path:
        """The file that the server reads."""
        return self.folder / "config.json"

    def begin_life(self) -> None:
        """Write what a new life of the server is to load: what was served before. Blocks for some milliseconds.

        A model that was just being loaded when the server died may be what killed it.
        """
        if self._lock is None:
            private_folder(self.folder.parent)
            self._lock = lock_of(self.folder)
            with suppress(*_NO_LOCK):  # a file system without locks: nobody can take the folder for stale either
                self._lock.acquire(timeout=0)
        self._write({name: graph for name, graph in self._graphs.items() if name in self._proved})

    def remove_folder(self) -> None:
        """Remove what was written. Blocks; called when the server has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            _unlock(self._lock)
            self._lock = None

    def forget(self, name: str) -> None:
        """Leave a model out from the next change, or the next life, on."""
        self._graphs.pop(name, None)
        self._proved.discard(name)

    async def add(self, name: str, graph: str) -> None:
        """Have the server load a model, unless it has, and wait until it can answer.

        Raises ModelUnusableError or EngineStartError with the server's reason, BadGatewayError when the server dies.
        """
        if self._graphs.get(name) != graph or name not in self._proved:
            self._attempts += 1  # a graph that failed is tried again when its place is another
            self._bases[name] = f"{quote(name, safe='')}-{self._attempts}"
        self._graphs[name] = graph
        try:
            async with asyncio.timeout(self._load_limit):
                await self._follow(name)
        except TimeoutError:
            raise EngineStartError(
                f"{name} was not loaded in {self._load_limit:g} s. Raise engine.start_limit in plugin.yaml if this "
                "machine is slow"
            ) from None
        self._proved.add(name)

    async def remove(self, name: str) -> None:
        """Have the server let go of a model, and wait until it has. A server that is not there needs not be told."""
        self.forget(name)
        await self._server.recovered()
        if not self._server.ready:
            return
        try:
            async with asyncio.timeout(_LEAVE_TIMEOUT):
                await self._apply()
                pause = _POLL_FIRST
                while name not in self._graphs and (await self.states()).get(name, _GONE).state != "END":
                    await asyncio.sleep(pause)
                    pause = min(pause * 1.5, _POLL_LAST)
        except (EnginePluginError, TimeoutError) as error:
            log.warning("%s: the server did not say that it let go of it: %s", name, error or "no answer in time")

    async def states(self) -> dict[str, ModelState]:
        """What the server holds. Raises UnavailableError and BadGatewayError."""
        async with self._server.client().get("/v1/config") as response:
            body = await response.read(_CONFIG_LIMIT)
        try:
            shape = json.loads(body)
            return {name: _state(entry["model_version_status"][0]) for name, entry in shape.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise BadGatewayError(f"the engine's list of models is not understood: {body[:200]!r}") from error

    async def _follow(self, name: str) -> None:
        """Tell the server, and watch what becomes of one model. Raises ModelUnusableError and EngineStartError."""
        complaint = await self._apply()
        pause = _POLL_FIRST
        while True:
            state = (await self.states()).get(name)
            if state is not None and state.state == "AVAILABLE":
                return
            if name not in self._graphs:
                raise UnavailableError(f"{name} was unloaded while it was being loaded")
            if state is None or state.failed:
                why = (state.complaint if state else "") or complaint or "it gives no reason"
                said = self._server.last_words() if why == _PRECONDITION or not state else ""
                text = f"{name} cannot be loaded: {why}{f'. Last lines: {said}' if said else ''}"
                if state is not None and state.unusable:
                    raise ModelUnusableError(f"{text}. Delete the model and pull it again, or pull another")
                raise EngineStartError(text)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _POLL_LAST)

    async def _apply(self) -> str:
        """Write the configuration and have it read; what the server complains of."""
        async with self._writing:
            await in_thread(self._write, dict(self._graphs))
        return await self._server.client().reload()

    def _write(self, graphs: Mapping[str, str]) -> None:
        private_folder(self.folder)
        entries = []
        for name, graph in graphs.items():
            base = self.folder / self._bases[name]
            private_folder(base)
            write_whole(base / _GRAPH, graph.encode(), base)
            entries.append({"name": name, "base_path": str(base), "graph_path": _GRAPH})
        write_json(self.config, {"mediapipe_config_list": entries, "model_config_list": []}, self.folder)
        used = {entry["base_path"] for entry in entries}
        for place in self.folder.iterdir():
            if place.is_dir() and str(place) not in used:
                shutil.rmtree(place, ignore_errors=True)


_GONE = ModelState("END", "", failed=True)
_PRECONDITION = "FAILED_PRECONDITION"


def _state(shape: Mapping[str, Any]) -> ModelState:
    status = shape["status"]
    code = str(status.get("error_code") or "OK")
    state, message = str(shape["state"]), str(status.get("error_message") or "")
    if code == "OK":  # our server then tells what keeps it from answering for a while
        memory = int(shape.get("memory") or 0)
        return ModelState(state, "" if message == "OK" else message, failed=state == "END", memory=memory)
    return ModelState(state, message or code, failed=True, unusable=code == _PRECONDITION)


class Resident:
    """One model in a server's memory, or on its way there. Owned by the pool; stopped once, then thrown away."""

    def __init__(
        self, model: StoredModel, graph: str, server: ResidentServer, residents: Residents, admission: Admission
    ) -> None:
        self.model = model
        self.admission = admission
        self._graph = graph
        self._server = server
        self._residents = residents
        self._work: SharedWork[None] = SharedWork(f"loading {model.name}")
        self._loaded = False
        self._stopped = False
        self._life: Life | None = None
        """The life of the server in which the model was seen to be served."""
        self._clients: set[ServerClient] = set()

    async def ensure_ready(self) -> None:
        """Load the model, sharing a load that is under way; wait for it in a server that was restarted.

        Raises ModelUnusableError or EngineStartError with the server's reason.
        """
        if not self.ready:
            await self._work.run(self._load)

    async def _load(self) -> None:
        try:
            await self._server.ensure_ready()
            life = self._server.life
            await self._residents.add(self.model.name, self._graph)
        except BaseException:
            self._loaded = False
            self._residents.forget(self.model.name)
            if self._server.ready:  # it may be loading still, or keep what failed in its list
                await self._residents.remove(self.model.name)
            raise
        self._life, self._loaded = life, True

    @property
    def loaded(self) -> bool:
        """Whether it was loaded, also when its server is just being restarted."""
        return self._loaded

    def doubt(self) -> None:
        """The server does not serve it after all: the next request, or load, checks it again."""
        self._life = None

    def client(self) -> ServerClient:
        """A client of the server that has it. Raises UnavailableError."""
        return self._server.client()

    @property
    def ready(self) -> bool:
        """Whether the model was seen to be served in this life of the server."""
        return self._loaded and self._life is self._server.life and self._server.ready

    @property
    def dead(self) -> bool:
        """Whether it serves nothing, and will not unless somebody asks."""
        return not self._work.running and (not self._loaded or self._server.dead)

    @property
    def crashed(self) -> bool:
        """Whether its server served and died, and has not proved itself since."""
        return self._server.crashed

    @asynccontextmanager
    async def working(self) -> AsyncIterator[ServerClient]:
        """A client for one request, which breaks off when the model must leave memory.

        Raises UnavailableError then. A model that turns out not to be served is looked at again by the next request.
        """
        if self._stopped:
            raise UnavailableError(_UNLOADED)
        client = self.client()
        self._clients.add(client)
        try:
            yield client
        except (BadGatewayError, UnavailableError):
            self.doubt()
            raise
        finally:
            self._clients.discard(client)

    async def stop(self) -> None:
        """Take the model out of memory; requests under way break off."""
        self._stopped = True
        self.admission.close()
        for client in self._clients:
            client.end(_UNLOADED)
        await self._work.cancel()
        await self._residents.remove(self.model.name)
        self._loaded = False

    def clean_up(self) -> None:
        """Leave nothing for the server's next life."""
        self._residents.forget(self.model.name)


_UNLOADED = "the model was taken out of memory while it worked on this request"
