"""The common part of the drivers of engines on this machine: install, start, stop, models on disk and in memory.

A driver adds its software, its models in memory, and the answers to calls.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from abc import abstractmethod
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from engine_plugin import catalogue
from engine_plugin.engines.base import Engine, Health, HealthState
from engine_plugin.engines.local.pool import ModelPool, ModelServer
from engine_plugin.engines.local.server import Place, socket_name
from engine_plugin.engines.options import option_problems, read_options
from engine_plugin.errors import (
    EnginePluginError,
    ModelInUseError,
    ModelNotFoundError,
    ModelNotLoadedError,
    ModelUnusableError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.install.holds import Hold
from engine_plugin.install.software import Backend, InstallHooks, LocalSoftware
from engine_plugin.models.capabilities import DigestCache, resolve, told_by_file
from engine_plugin.models.info import KIND_OF_SERVICE, Loaded
from engine_plugin.process import memory
from engine_plugin.process.environ import child_environ
from engine_plugin.process.records import ProcessRecords
from engine_plugin.protocol.shapes import EngineCheck, EngineConfig
from engine_plugin.single_flight import SingleFlight
from engine_plugin.system.files import in_thread, private_data_dir, private_folder
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
    from pathlib import Path

    from engine_plugin.download.events import PullEvent
    from engine_plugin.engines.base import Progress
    from engine_plugin.engines.local.options import ServerOptions
    from engine_plugin.errors import Problem
    from engine_plugin.manifest import Manifest
    from engine_plugin.models.info import ModelCapabilities
    from engine_plugin.models.store import ModelInfo, ModelStore, PullRequest, StoredModel

__all__ = ["Condition", "Driver"]

log = logging.getLogger(__name__)


_LOOK = 5.0  # seconds for the health checks of servers

ServerT = TypeVar("ServerT", bound=ModelServer)


class Condition(NamedTuple):
    """The state of an engine: its problems, in words, and whether a part of it can answer, or soon will."""

    complaints: Sequence[str]
    serves: bool = True


class Driver(Engine, Generic[ServerT]):
    """An `Engine` whose software is on this machine and whose models come into memory when they are first used."""

    title: ClassVar[str]
    """The engine's name in messages."""

    options_class: ClassVar[type[ServerOptions]]
    """The engine's options in plugin.yaml."""

    software: LocalSoftware[Any]
    """The engine's software on this machine."""

    store: ModelStore
    """The models on the disk."""

    pool: ModelPool[ServerT]
    """The models in memory."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self._options = read_options(self.options_class, manifest)
        self.data = manifest.data_dir
        """The data directory."""
        self.records = ProcessRecords(self.data / "run")
        """The records of the engine's processes."""
        self.starting: SingleFlight[None] = SingleFlight(f"starting {self.title}")
        """The start, or the repair of a running engine, that is under way."""
        self.installing: SingleFlight[str] = SingleFlight(f"installing {self.title}")
        """The installation or upgrade that is under way."""
        self.backend: Backend | None = None
        """The software that runs; None before a start and after a stop."""
        self.sockets: Path | None = None
        """The private directory of the servers' unix sockets, while there is one."""
        self._environ = child_environ(os.environ)
        self._hold = Hold()
        """Of the installed version that `backend` needs."""
        self._mode = "auto"
        self._keeping: asyncio.Task[None] | None = None
        self._cleanup = ExitStack()
        self._lifecycle = asyncio.Lock()
        self._reported: DigestCache[ModelCapabilities] = DigestCache()
        """What running engines reported of models, which stays valid after an unload."""

    @classmethod
    def check_options(cls, manifest: Manifest) -> Sequence[Problem]:
        return option_problems(cls.options_class, manifest)

    # The steps that a driver adds

    @abstractmethod
    def require_device(self, mode: str, devices: list[dict[str, Any]] | None, backend: Backend) -> None:
        """Raise UnsupportedError or PreconditionError when the engine cannot compute on the device of `mode`.

        `devices` is the result of `probe`; None: unknown.
        """

    @abstractmethod
    async def try_out(self, backend: Backend, model: StoredModel, place: Place) -> None:
        """Have new software answer with a sample model, beside the running one. Raises EnginePluginError."""

    async def begin(self, backend: Backend, mode: str, devices: list[dict[str, Any]] | None) -> None:
        """Start what must run before a model is loaded; `end` follows, also when this fails."""

    async def renew(self) -> None:
        """Leave what runs for `backend`, or for `_mode`, which are new, letting running requests end."""
        await self.pool.drain()

    async def end(self) -> None:
        """End what `begin` started, if it did, and the requests under way; the pool is closed afterwards."""

    # Software

    async def check(self) -> EngineCheck:
        return await asyncio.to_thread(self.software.check)

    async def install(self, progress: Progress, *, cover: bool) -> str:
        hooks = self._install_hooks(progress)
        return await self.installing.run(lambda: self.software.install(progress, hooks, cover=cover))

    async def upgrade(self, progress: Progress) -> str:
        return await self.installing.run(lambda: self._upgrade(progress))

    async def _upgrade(self, progress: Progress) -> str:
        done = await self.software.upgrade(progress, self._install_hooks(progress))
        return f"{'upgraded' if done else 'nothing to upgrade'}: {(await self.check()).detail}"

    def _install_hooks(self, progress: Progress) -> InstallHooks:
        """The steps of an installation in the engine. Loaded models are loaded again, after a failure too."""
        loaded: dict[str, None] = {}  # in order

        async def adopt() -> None:
            loaded.update(dict.fromkeys(self.loaded()))
            await self._adopt(list(loaded), progress)

        return InstallHooks(self._trial, adopt)

    async def _trial(self, backend: Backend) -> None:
        """Have new software answer with a sample, beside what runs. Raises EnginePluginError."""
        model = await self.store.get(self.store.sample_for("chat"))
        await self.init_env()
        with ExitStack() as cleanup:
            folder = await in_thread(self._private_folder, cleanup) if self._use_unix_sockets() else None
            await self.try_out(backend, model, Place(self.records, self._environ, folder))

    async def _adopt(self, models: list[str], progress: Progress) -> None:
        """Move a running engine to the installed software, with `models` loaded; a stopped one stays stopped."""
        if self.backend is None:
            return
        found, hold = await in_thread(self.software.acquire)
        if self.backend in (None, found):  # a stop came meanwhile, or it is the same
            hold.release()
            return
        progress("moving the running engine to the new version")
        self.backend = found
        old, self._hold = self._hold, hold
        try:
            await self.renew()
            await self._load_again(models)
        finally:
            old.release()

    async def _load_again(self, models: Sequence[str]) -> None:
        for name in models:
            try:
                with suppress(ModelNotFoundError, ModelUnusableError):  # deleted or damaged meanwhile
                    await self.pool.load(await self.store.get(name))
            except EnginePluginError:
                if self.backend is not None:  # else a stop ended it
                    raise

    async def init_env(self) -> None:
        await in_thread(private_data_dir, self.data)
        for folder in (self.data / "models", self.data / "run"):
            await in_thread(private_folder, folder)
        await asyncio.to_thread(self.records.reap)

    async def version(self) -> str:
        running = self.backend
        backend = running if running is not None else await in_thread(self.software.find)
        return backend.version or str((await self.software.probe(backend))["version"])

    def config(self) -> EngineConfig:
        return EngineConfig(
            host="" if self._use_unix_sockets() else "127.0.0.1",  # a private socket has no host to show
            scheme="http",
            recommend_model=self.store.sample_for("chat"),
            download_path=str(self.software.folder),
            engine_path=str(self.data),
            exec_path=os.path.dirname(sys.executable),  # noqa: PTH120  # the wire wants the text
            exec_file=os.path.basename(sys.executable),  # noqa: PTH119
            device_type=self._mode,
        )

    # Start, stop and health

    async def start(self, mode: str) -> None:
        if self.backend is None:
            await self.starting.run(lambda: self._start(mode))
        else:
            await self.starting.run(self._heal)
        await self._change_mode(mode)  # also after joining the start of another caller

    async def _start(self, mode: str) -> None:
        async with self._lifecycle:  # a stop under way ends first
            await self.software.sweep()
            backend, self._hold = await in_thread(self.software.acquire)
            try:
                await self.init_env()
                await self._begin(backend, mode)
            except BaseException:
                self._hold.release()
                raise

    async def _begin(self, backend: Backend, mode: str) -> None:
        probed = await self.software.probe(backend)
        self.require_device(mode, probed["devices"], backend)
        if self._use_unix_sockets() and self.sockets is None:
            self.sockets = await in_thread(self._private_folder, self._cleanup)  # ends before a stop cleans it up
            self._keep_sockets(self.sockets)
        try:
            await self.begin(backend, mode, probed["devices"])
        except BaseException:
            await self.end()
            raise
        self._mode, self.backend = mode, backend
        log.info("%s is ready: %s, version %s, mode %s", self.title, backend.origin, probed["version"], mode)

    async def _heal(self) -> None:
        """Restart each server that failed or whose socket was removed. Raises EnginePluginError when no server
        starts."""
        async with self._lifecycle:
            if self.backend is None:
                return
            if self.sockets is not None and not await in_thread(self.sockets.is_dir):
                log.warning("%s: the directory of its sockets was removed; it is made again", self.title)
                await in_thread(self._private_folder, self._cleanup, self.sockets)
            with suppress(TimeoutError):  # a server without an answer is busy, or hangs and is killed later
                async with asyncio.timeout(_LOOK):
                    await self.condition()  # restarts servers that cannot be reached
            missing = await self.revive()
            done = await asyncio.gather(*map(self.pool.load, missing), return_exceptions=True)
        failures = [failure for failure in done if isinstance(failure, BaseException)]
        for failure in failures:
            if not isinstance(failure, EnginePluginError) or len(failures) == len(self.pool.all_servers()):
                raise failure

    async def _change_mode(self, mode: str) -> None:
        """Move the engine and its loaded models to another device that `mode` names; auto keeps the present one."""
        if mode in ("auto", self._mode) or self.backend is None:
            return
        self.require_device(mode, (await self.software.probe(self.backend))["devices"], self.backend)
        loaded = self.loaded()
        self._mode = mode
        await self.renew()
        await self._load_again(loaded)

    def loaded(self) -> list[str]:
        """The names of the models in memory."""
        return [server.model.name for server in self.pool.servers()]

    async def stop(self) -> None:
        await self.starting.cancel()
        async with self._lifecycle:
            self.backend = None
            await self.end()
            await self.pool.close()
            self._hold.release()
            self.sockets = None
            if self._keeping is not None:
                self._keeping.cancel()
            await in_thread(self._cleanup.close)

    async def aclose(self) -> None:
        await self.installing.cancel()
        await self.stop()
        await self.store.aclose()

    async def health(self) -> Health:
        if self.backend is None:
            return Health.dead(catalogue.ENGINE_NOT_RUNNING.error())
        found = await self.condition()
        if complaints := [*found.complaints, *filter(None, [self._removed()])]:
            state = HealthState.DEGRADED if found.serves else HealthState.DEAD
            return Health(state, "; ".join(complaints))
        return Health(HealthState.READY, f"{len(self.pool.servers())} models loaded")

    @abstractmethod
    async def condition(self) -> Condition:
        """The state of the running engine. Bounded to a few seconds."""

    @abstractmethod
    async def revive(self) -> Sequence[StoredModel]:
        """Start the failed servers of models; return the models that were served before and are not served now."""

    # Models

    async def list_models(self) -> Sequence[ModelInfo]:
        return [replace(model, capabilities=self.capabilities(model)) for model in await self.store.list()]

    def capabilities(self, model: ModelInfo) -> ModelCapabilities:
        """The capabilities of a model. Cheap, because each list of models calls it for each model."""
        return resolve(
            model.name,
            model.details.family,
            model.details.parameter_size,
            kind=model.kind,
            engine=self._reported.peek(model.name, model.digest),
            file=told_by_file(model.kind, model.details),
            overrides=self._options.models,
        )

    def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        return self.store.pull(request)

    async def delete_model(self, name: str) -> None:
        with suppress(ModelNotFoundError, ModelUnusableError, ModelNotLoadedError):  # the store deletes any file
            model = await self.store.get(name)
            if users := self.pool.users(model.name):
                raise ModelInUseError(
                    f"model: {model.name} is answering {users} requests; delete it when they are done"
                )
            if not model.bundled:  # the store refuses to delete those, so they may stay in memory
                await self.pool.unload(model.name)
        await self.store.delete(name)

    async def load_model(self, name: str) -> None:
        self._require_running()
        if removed := self._removed():
            raise UnavailableError(removed)
        await self.pool.load(await self.store.get(name))

    async def unload_model(self, name: str) -> None:
        model = await self.store.get(name)
        await self.pool.unload(model.name)

    async def running_models(self) -> Sequence[ModelInfo]:
        sizes = await self.memory()

        def running(model: StoredModel) -> ModelInfo:
            size, idle = sizes.get(model.name, 0), self.pool.idle(model.name)
            loaded = Loaded(memory=size, idle=idle, context_length=self.loaded_context(model))
            return replace(model, capabilities=self.capabilities(model), loaded=loaded)

        return [running(server.model) for server in self.pool.servers()]

    @abstractmethod
    async def memory(self) -> Mapping[str, int]:
        """The bytes that the models in memory take, by name, without those of an unknown size. Bounded to some
        seconds."""

    def loaded_context(self, model: StoredModel) -> int:  # noqa: ARG002  # for engines that know
        """The tokens of context that a model is loaded with, 0 when unknown."""
        return 0

    # Services

    async def default_model(self, service: str) -> str:
        return (await self.default_models((service,)))[service]

    async def default_models(self, services: Iterable[str]) -> dict[str, str]:
        kinds = {name: KIND_OF_SERVICE.get(name, "") if name in self.services else "" for name in services}
        models = await self.store.defaults_for({*kinds.values()} - {""})
        return {name: models.get(kind, "") for name, kind in kinds.items()}

    async def is_sample(self, name: str) -> bool:
        return await self.store.is_sample(name)

    async def _model_for(self, service: str, name: str) -> StoredModel:
        """The model of that name, which must be of the service's kind. Raises InvalidRequestError, and
        UnavailableError before a start."""
        self._require_running()
        model = await self.store.get(name)
        wanted = KIND_OF_SERVICE[service]
        if model.kind != wanted:
            raise catalogue.MODEL_KIND_MISMATCH.error(
                model=model.name, kind=model.kind, service=service, wanted=wanted
            )
        return model

    @property
    def _place(self) -> Place:
        return Place(self.records, self._environ, self.sockets)

    def _require_running(self) -> Backend:
        """The software that runs. Raises UnavailableError before a start and after a stop."""
        if self.backend is None:
            raise catalogue.ENGINE_NOT_RUNNING.error()
        return self.backend

    def _removed(self) -> str:
        """The complaint when the software was deleted while it runs, which no lock prevents; else ""."""
        backend = self.backend
        if backend is None or backend.folder is None or backend.folder.is_dir():
            return ""
        return f"{backend.origin} was deleted: call StopEngine, InstallEngine and StartEngine"

    def _private_folder(self, cleanup: ExitStack, again: Path | None = None) -> Path:
        """A directory for the engine's sockets, until `cleanup`. Removes those that killed plugins left."""
        if sys.platform != "win32":
            from engine_plugin.system.socketdir import private_directory

            return cleanup.enter_context(private_directory("", "", longest=socket_name(), again=again))
        raise UnsupportedError("engine.transport: there are no unix sockets on Windows; use auto or tcp")

    def _keep_sockets(self, folder: Path) -> None:
        if sys.platform != "win32":
            from engine_plugin.system.socketdir import keep_fresh

            self._keeping = asyncio.create_task(keep_fresh(folder))

    def _require_memory(self, model: StoredModel, process: int, weights: int) -> None:
        """Refuse a model for which there is too little memory, before the system kills its process.

        `process` are the bytes that a process takes at least, `weights` those of files that it holds in memory of its
        own. Raises PreconditionError.
        """
        room, space = memory.room(), memory.address_space()
        if process + weights > room.free:
            needed, limit = process + weights, str(room)
        elif 0 < space < process + model.size:
            needed, limit = process + model.size, f"ulimit -v lets each process have {byte_size(space)}"
        else:
            return
        raise catalogue.MEMORY_INSUFFICIENT.error(model=model.name, needed=byte_size(needed), limit=limit)

    def _use_unix_sockets(self) -> bool:
        wanted = self._options.transport
        return wanted == "unix" or (wanted == "auto" and sys.platform != "win32")
