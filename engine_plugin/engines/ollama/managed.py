"""Our own Ollama: its software, and its server from start to stop, across new versions and other devices."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.engines.base import Health, HealthState
from engine_plugin.engines.ollama.entries import entries_of
from engine_plugin.engines.ollama.server import ManagedServer, try_out
from engine_plugin.engines.ollama.software import Software
from engine_plugin.errors import EnginePluginError, InvalidRequestError
from engine_plugin.install.holds import Hold
from engine_plugin.install.software import Moves
from engine_plugin.process.records import ProcessRecords
from engine_plugin.protocol.shapes import EngineConfig
from engine_plugin.system.files import in_thread, private_data_dir, private_folder
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from engine_plugin.engines.base import Progress
    from engine_plugin.engines.ollama.connection import OllamaClient
    from engine_plugin.engines.ollama.options import OllamaOptions
    from engine_plugin.engines.ollama.software import Backend
    from engine_plugin.protocol.shapes import EngineCheck

__all__ = ["OwnServer"]

log = logging.getLogger(__name__)

_LOAD = 600.0
"""Seconds for a model to come into memory again."""


class OwnServer:
    """Ollama as a part of this plugin. Owned by the engine, used from one event loop."""

    def __init__(self, options: OllamaOptions, data_dir: Path, environ: Mapping[str, str]) -> None:
        """No I/O."""
        self._options = options
        self._data = data_dir
        self._environ = environ
        self._software = Software(options, data_dir, environ)
        self._records = ProcessRecords(data_dir / "run")
        self._server: ManagedServer | None = None
        self._backend: Backend | None = None
        self._hold = Hold()
        """Of the installed version that `_backend` is."""
        self._mode = "auto"
        self._moving = asyncio.Lock()

    @property
    def running(self) -> bool:
        """Whether it was started, and not stopped since; its process may be just coming back from a crash."""
        return self._server is not None

    async def client(self) -> OllamaClient:
        """The client of its server, once that serves. Raises UnavailableError, and what keeps it from serving."""
        async with self._moving:
            server = self._server
        if server is None:
            raise catalogue.ENGINE_NOT_RUNNING.error()
        await server.ensure_ready()
        return server.client()

    # Software

    async def check(self) -> EngineCheck:
        """Whether the software is here."""
        return await in_thread(self._software.check)

    async def install(self, progress: Progress, *, cover: bool) -> str:
        """Put the software here; returns what is installed now."""
        return await self._software.install(progress, Moves(self._trial, self._adopter(progress)), cover=cover)

    async def upgrade(self, progress: Progress) -> str:
        """Bring the software to the wanted version; returns what is installed now."""
        done = await self._software.upgrade(progress, Moves(self._trial, self._adopter(progress)))
        return f"{'upgraded' if done else 'nothing to upgrade'}: {(await self.check()).detail}"

    async def version(self) -> str:
        """The version of what runs, else of what is installed. Raises EngineNotInstalledError."""
        if self._server is not None and self._server.version:
            return self._server.version
        backend = self._backend if self._backend is not None else await in_thread(self._software.find)
        return backend.version or str((await self._software.probe(backend))["version"])

    async def init_env(self) -> None:
        """Make the directories, and end what a killed plugin left."""
        await in_thread(private_data_dir, self._data)
        for folder in (self._data / "models", self._data / "run"):
            await in_thread(private_folder, folder)
        await in_thread(self._records.reap)

    def config(self) -> EngineConfig:
        """Where it is."""
        executable = Path(self._backend.executable) if self._backend else Path("ollama")
        return EngineConfig(
            host=self._server.address.removeprefix("http://") if self._server else "",
            scheme="http",
            download_path=str(self._software.folder),
            engine_path=str(self._data),
            exec_path=str(executable.parent),
            exec_file=executable.name,
            device_type=self._mode,
        )

    # Life

    async def start(self, mode: str) -> None:
        """Start the server. Raises EngineNotInstalledError, EngineStartError."""
        await self._software.sweep()
        backend, self._hold = await in_thread(self._software.take)
        try:
            await self.init_env()
            server = await self._started(backend, mode)
        except BaseException:
            self._hold.release()
            raise
        self._server, self._backend, self._mode = server, backend, mode
        log.info("our own Ollama %s is ready at %s, mode %s", server.version, server.address, mode)

    async def _started(self, backend: Backend, mode: str) -> ManagedServer:
        server = self._new(backend, mode)
        try:
            await server.ensure_ready()
        except BaseException:
            await server.close()
            raise
        return server

    async def revive(self) -> None:
        """Have a server that failed serve again. Raises EnginePluginError when it does not."""
        if self._server is not None:
            await self._server.ensure_ready()

    async def change_mode(self, mode: str) -> None:
        """An explicit other device moves the server there; auto is content with what runs."""
        if mode not in ("auto", self._mode) and self._backend is not None:
            await self._move(self._backend, mode)

    async def stop(self) -> None:
        """End the server with all that it started."""
        server, self._server = self._server, None
        self._backend = None
        if server is not None:
            await server.close()
        self._hold.release()

    async def health(self) -> Health:
        """How the server is."""
        server = self._server
        if server is None:
            return Health.dead(catalogue.ENGINE_NOT_RUNNING.error())
        if wrong := await server.complaint():
            return Health(HealthState.DEAD if server.failed else HealthState.DEGRADED, wrong)
        return Health(HealthState.READY, f"our own Ollama {server.version} at {server.address}")

    # How it is done

    def _new(self, backend: Backend, mode: str) -> ManagedServer:
        return ManagedServer(backend, self._options, self._records, self._data, self._environ, mode)

    async def _trial(self, backend: Backend) -> None:
        await try_out(backend, self._options, self._records, self._environ)

    def _adopter(self, progress: Progress) -> Callable[[], Awaitable[None]]:
        async def adopt() -> None:
            """Have a running server be replaced by what is installed now; one that is stopped stays so."""
            before = self._backend
            if before is None:
                return
            found, hold = await in_thread(self._software.take)
            if self._backend is None or found == before:
                hold.release()
                return
            progress("moving the running server to the new version")
            old, self._hold = self._hold, hold
            try:
                await self._move(found, self._mode)
            except BaseException:  # the old one runs again
                self._hold = old
                hold.release()
                raise
            old.release()

        return adopt

    async def _move(self, backend: Backend, mode: str) -> None:
        """Another server in the place of this one, with the same models in memory; running requests end first.

        They cannot run side by side: both have the same files. When the new one does not come up, the old comes back.
        """
        async with self._moving:
            before, was = self._server, (self._backend, self._mode)
            if before is None or was == (backend, mode):  # a stop, or another who wanted the same, came first
                return
            loaded = await _loaded(before)
            if not await comes_true(before.client().quiet(), within=self._options.drain_timeout):
                log.warning("requests did not end in %g s: they break off", self._options.drain_timeout)
            await before.close()
            if self._server is before:  # else a stop came meanwhile
                await self._replace(backend, mode, was)
                await self._load_again(loaded)

    async def _replace(self, backend: Backend, mode: str, was: tuple[Backend | None, str]) -> None:
        server = self._server = self._new(backend, mode)
        self._backend, self._mode = backend, mode
        try:
            await server.ensure_ready()
        except EnginePluginError:
            await server.close()
            if self._server is server and was[0] is not None:  # else a stop came meanwhile
                self._server = self._new(was[0], was[1])
                self._backend, self._mode = was
                await self._server.ensure_ready()
            raise

    async def _load_again(self, names: list[str]) -> None:
        """Those that do not load any more are loaded when they are asked for, or say then why not."""
        for name in names:
            server = self._server
            if server is None:  # a stop came meanwhile
                return
            try:
                await _load(server.client(), name)
            except EnginePluginError as error:
                log.warning("%s is not in memory any more: %s", name, error)


async def _loaded(server: ManagedServer) -> list[str]:
    """The names of the models that it has in memory; none when it does not say."""
    try:
        return [entry["name"] for entry in entries_of(await server.client().ask("GET", "/api/ps"))]
    except EnginePluginError:
        return []


async def _load(client: OllamaClient, name: str) -> None:
    """Bring a model into memory that is for answers, or else for embeddings."""
    try:
        await client.ask("POST", "/api/generate", {"model": name, "stream": False}, model=name, within=_LOAD)
    except InvalidRequestError:
        await client.ask("POST", "/api/embed", {"model": name, "input": []}, model=name, within=_LOAD)
