"""The models that one server has in memory: its config.json, and the state of each model in the server.

A server loads the models of its config.json when it starts, and applies changes of it on request. `LoadedModels`
writes the file and waits for each model; `LoadedModel` is one model as the pool sees it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from engine_plugin.engines.local.server import ServerProcess
from engine_plugin.engines.local.single_flight import SingleFlight
from engine_plugin.engines.openvino.client import ServerClient
from engine_plugin.engines.openvino.graphs import write_graphs
from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    EngineStartError,
    ModelUnusableError,
    UnavailableError,
)
from engine_plugin.system.files import in_thread, private_folder, write_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from filelock import BaseFileLock

    from engine_plugin.engines.local.admission import Admission
    from engine_plugin.engines.openvino.entries import ModelEntry
    from engine_plugin.models.store import StoredModel
    from engine_plugin.process.run import ProcessRun

__all__ = ["LoadedModel", "LoadedModels", "ModelState", "SharedServer", "lock_of", "remove_stale"]

log = logging.getLogger(__name__)

_CONFIG_LIMIT = 16 * 1024 * 1024
_POLL_FIRST, _POLL_LAST = 0.01, 0.25
_LEAVE_TIMEOUT = 30.0
_NO_LOCK = (OSError, NotImplementedError)
"""The lock is taken (filelock's Timeout is an OSError), or the file system has no locks."""


class ModelState(NamedTuple):
    """A model's state in the server, from GET /v1/config."""

    state: str
    """LOADING, AVAILABLE, UNLOADING or END, as OVMS names them."""
    complaint: str
    """The error; "" without one."""
    failed: bool
    """Whether the server has given the model up."""
    memory: int = 0
    """Bytes of memory; 0 where the server does not report them."""
    unusable: bool = False
    """Whether it failed because of its files, so that another attempt would fail as well."""


class SharedServer(ServerProcess):
    """The server that `LoadedModels` and each `LoadedModel` talk to; `OpenVinoServer` completes it."""

    is_ours: bool
    """Whether it is the embedded server, which can do more than the OpenVINO Model Server."""

    def client(self) -> ServerClient:
        """A client of its latest run. Raises UnavailableError when it is not up."""
        return ServerClient(self._require_client(), self.latest_run)

    def last_lines(self) -> str:
        """The last lines of its log."""
        return self.latest_run.last_lines() if self.latest_run else ""


def remove_stale(folder: Path) -> None:
    """Remove the servers' folders below `folder` that killed plugins have left, also of other versions. Blocks."""
    for place in folder.iterdir() if folder.is_dir() else ():
        server = place.with_suffix("")  # a folder, or the lock of one
        lock = lock_of(server)
        try:
            lock.acquire(timeout=0)
        except _NO_LOCK:
            continue  # its plugin may be alive
        shutil.rmtree(server, ignore_errors=True)
        _unlock(lock)


def lock_of(folder: Path) -> BaseFileLock:
    """The lock file beside a server's folder; its plugin's process holds the lock."""
    from filelock import FileLock

    return FileLock(folder.with_suffix(".lock"), mode=0o600, thread_local=False)


def _unlock(lock: BaseFileLock) -> None:
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


class LoadedModels:
    """config.json of one server, in `folder`, which is created and removed here and locked in between.

    The embedded server reads a list of entries (docs/openvino-server.md), the OpenVINO Model Server a graph for each
    model. Each of its graphs lies in a folder of its own, which gets a new name when the graph changes: the model
    server looks for changes in config.json alone.
    """

    def __init__(self, folder: Path, server: SharedServer, load_limit: float) -> None:
        """`load_limit` is in seconds, for one model."""
        self.folder = folder
        self._server = server
        self._load_limit = load_limit
        self._entries: dict[str, ModelEntry] = {}
        self._attempts = 0
        self._places: dict[str, str] = {}
        """The folder of each model's graph, below `folder`."""
        self._proved: set[str] = set()
        """The models that have been available."""
        self._writing = asyncio.Lock()
        self._lock: BaseFileLock | None = None

    @property
    def config(self) -> Path:
        """The file that the server reads."""
        return self.folder / "config.json"

    def begin_run(self) -> None:
        """Write the config.json of a new run: the models that have been available. Blocks for some milliseconds.

        A model that was being loaded when the server died is left out, because it may have killed the server.
        """
        if self._lock is None:
            private_folder(self.folder.parent)
            self._lock = lock_of(self.folder)
            with suppress(*_NO_LOCK):  # without locks, remove_stale leaves the folder alone as well
                self._lock.acquire(timeout=0)
        self._write({name: entry for name, entry in self._entries.items() if name in self._proved})

    def remove_folder(self) -> None:
        """Remove the folder and its lock. Blocks; called when the server has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            _unlock(self._lock)
            self._lock = None

    def forget(self, name: str) -> None:
        """Leave a model out of the next config.json that is written."""
        self._entries.pop(name, None)
        self._proved.discard(name)

    async def add(self, entry: ModelEntry) -> None:
        """Have the server load a model, unless it has, and wait until it is available.

        Raises ModelUnusableError or EngineStartError with the server's reason, BadGatewayError when the server dies.
        """
        name = entry["name"]
        if self._entries.get(name) != entry or name not in self._proved:
            self._attempts += 1  # OVMS tries a failed graph again only in another folder
            self._places[name] = f"{quote(name, safe='')}-{self._attempts}"
        self._entries[name] = entry
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
        """Have the server unload a model, and wait until it has; nothing when the server does not run."""
        self.forget(name)
        await self._server.recovered()
        if not self._server.ready:
            return
        try:
            async with asyncio.timeout(_LEAVE_TIMEOUT):
                await self._apply()
                pause = _POLL_FIRST
                while name not in self._entries and (await self.states()).get(name, _GONE).state != "END":
                    await asyncio.sleep(pause)
                    pause = min(pause * 1.5, _POLL_LAST)
        except (EnginePluginError, TimeoutError) as error:
            log.warning("%s: the server did not confirm the unload: %s", name, error or "no answer in time")

    async def states(self) -> dict[str, ModelState]:
        """The state of each model, by name. Raises UnavailableError and BadGatewayError."""
        async with self._server.client().get("/v1/config") as response:
            body = await response.read(_CONFIG_LIMIT)
        try:
            shape = json.loads(body)
            return {name: _state(entry["model_version_status"][0]) for name, entry in shape.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise BadGatewayError(f"the engine's list of models is not understood: {body[:200]!r}") from error

    async def _follow(self, name: str) -> None:
        """Apply the configuration and wait for one model. Raises ModelUnusableError and EngineStartError."""
        complaint = await self._apply()
        pause = _POLL_FIRST
        while True:
            state = (await self.states()).get(name)
            if state is not None and state.state == "AVAILABLE":
                return
            if name not in self._entries:
                raise UnavailableError(f"{name} was unloaded while it was being loaded")
            if state is None or state.failed:
                why = (state.complaint if state else "") or complaint or "the server gives no reason"
                said = self._server.last_lines() if why == _PRECONDITION or not state else ""
                text = f"{name} cannot be loaded: {why}{f'. Last lines: {said}' if said else ''}"
                if state is not None and state.unusable:
                    raise ModelUnusableError(f"{text}. Delete the model and pull it again, or pull another")
                raise EngineStartError(text)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _POLL_LAST)

    async def _apply(self) -> str:
        """Write the configuration and have the server read it. Returns the server's complaint, or ""."""
        async with self._writing:
            await in_thread(self._write, dict(self._entries))
        return await self._server.client().reload()

    def _write(self, entries: Mapping[str, ModelEntry]) -> None:
        private_folder(self.folder)
        if self._server.is_ours:
            write_json(self.config, {"models": list(entries.values())}, self.folder)
            return
        write_graphs(self.folder, {self._places[name]: entry for name, entry in entries.items()})
        used = {self._places[name] for name in entries}
        for place in self.folder.iterdir():
            if place.is_dir() and place.name not in used:
                shutil.rmtree(place, ignore_errors=True)


_GONE = ModelState("END", "", failed=True)
_PRECONDITION = "FAILED_PRECONDITION"


def _state(shape: Mapping[str, Any]) -> ModelState:
    status = shape["status"]
    code = str(status.get("error_code") or "OK")
    state, message = str(shape["state"]), str(status.get("error_message") or "")
    if code == "OK":  # the embedded server's message is then the reason why the model cannot answer now
        memory = int(shape.get("memory") or 0)
        return ModelState(state, "" if message == "OK" else message, failed=state == "END", memory=memory)
    return ModelState(state, message or code, failed=True, unusable=code == _PRECONDITION)


class LoadedModel:
    """One model in a server's memory, or being loaded. Owned by the pool; closed once, then discarded."""

    def __init__(
        self, model: StoredModel, entry: ModelEntry, server: SharedServer, models: LoadedModels, admission: Admission
    ) -> None:
        self.model = model
        self.admission = admission
        self._entry = entry
        self._server = server
        self._models = models
        self._work: SingleFlight[None] = SingleFlight(f"loading {model.name}")
        self._loaded = False
        self._closed = False
        self._run: ProcessRun | None = None
        """The run of the server in which the model became available."""
        self._clients: set[ServerClient] = set()

    async def ensure_ready(self) -> None:
        """Load the model, or join a load that is under way; after a restart of the server, wait for the model.

        Raises ModelUnusableError or EngineStartError with the server's reason.
        """
        if not self.ready:
            await self._work.run(self._load)

    async def _load(self) -> None:
        try:
            await self._server.ensure_ready()
            run = self._server.latest_run
            await self._models.add(self._entry)
        except BaseException:
            self._loaded = False
            self._models.forget(self.model.name)
            if self._server.ready:  # it may still be loading the model, or list it as failed
                await self._models.remove(self.model.name)
            raise
        self._run, self._loaded = run, True

    @property
    def loaded(self) -> bool:
        """Whether it was loaded; also true while its server is being restarted."""
        return self._loaded

    def doubt(self) -> None:
        """Have the next request, or load, check whether the server still has the model."""
        self._run = None

    def client(self) -> ServerClient:
        """A client of the server that has it. Raises UnavailableError."""
        return self._server.client()

    @property
    def ready(self) -> bool:
        """Whether the model has been available in this run of the server."""
        return self._loaded and self._run is self._server.latest_run and self._server.ready

    @property
    def dead(self) -> bool:
        """Whether it is not in memory, and is loaded only by the next request."""
        return not self._work.running and (not self._loaded or self._server.dead)

    @property
    def crashed(self) -> bool:
        """Whether its server served and died, and has not served for a stable time since."""
        return self._server.crashed

    @asynccontextmanager
    async def working(self) -> AsyncIterator[ServerClient]:
        """A client for one request, which fails with UnavailableError when the model leaves memory.

        After an error of the server the next request checks the model again.
        """
        if self._closed:
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

    async def close(self) -> None:
        """Unload the model; running requests are cancelled."""
        self._closed = True
        self.admission.close()
        for client in self._clients:
            client.end(_UNLOADED)
        await self._work.cancel()
        await self._models.remove(self.model.name)
        self._loaded = False

    def clean_up(self) -> None:
        """Keep the model out of the server's next run."""
        self._models.forget(self.model.name)


_UNLOADED = "the model was unloaded during this request"
