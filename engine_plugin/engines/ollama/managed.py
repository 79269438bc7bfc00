"""The managed server: its software, and its process from start to stop, across upgrades and changes of the mode."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.engines.base import Health, HealthState
from engine_plugin.engines.ollama.entries import named_entries
from engine_plugin.engines.ollama.server_process import OllamaProcess, trial_run
from engine_plugin.engines.ollama.software import OllamaSoftware
from engine_plugin.errors import EnginePluginError, InvalidRequestError
from engine_plugin.install.holds import Hold
from engine_plugin.install.software import InstallHooks
from engine_plugin.process.records import ProcessRecords
from engine_plugin.protocol.shapes import EngineConfig
from engine_plugin.system.files import in_thread, private_data_dir, private_folder
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from engine_plugin.engines.base import Progress
    from engine_plugin.engines.ollama.client import OllamaClient
    from engine_plugin.engines.ollama.options import OllamaOptions
    from engine_plugin.install.software import Backend
    from engine_plugin.protocol.shapes import EngineCheck

__all__ = ["ManagedServer"]

log = logging.getLogger(__name__)

_LOAD_TIMEOUT = 600.0
"""Seconds for a model to load again."""


class ManagedServer:
    """An Ollama server that the plugin installs, starts, upgrades and stops.

    Owned by the engine, used from one loop.
    """

    def __init__(self, options: OllamaOptions, data_dir: Path, environ: Mapping[str, str]) -> None:
        """No I/O."""
        self._options = options
        self._data = data_dir
        self._environ = environ
        self._software = OllamaSoftware(options, data_dir, environ)
        self._records = ProcessRecords(data_dir / "run")
        self._process: OllamaProcess | None = None
        self._program: Backend | None = None
        self._hold = Hold()
        """The hold on the installed version of `_program`."""
        self._mode = "auto"
        self._replacing = asyncio.Lock()

    @property
    def running(self) -> bool:
        """Whether the server was started and not stopped since; its process may be restarting after a crash."""
        return self._process is not None

    async def client(self) -> OllamaClient:
        """The client of the server, once it is ready.

        Raises UnavailableError if it is stopped, or why it does not start.
        """
        async with self._replacing:
            process = self._process
        if process is None:
            raise catalogue.ENGINE_NOT_RUNNING.error()
        await process.ensure_ready()
        return process.client()

    # Software

    async def check(self) -> EngineCheck:
        """Whether the software is installed."""
        return await in_thread(self._software.check)

    async def install(self, progress: Progress, *, cover: bool) -> str:
        """Install the software and return a description of it. `progress` receives the steps."""
        return await self._software.install(
            progress, InstallHooks(self._try_out, self._adopter(progress)), cover=cover
        )

    async def upgrade(self, progress: Progress) -> str:
        """Install the wanted version if another one is installed, and return a description of the result."""
        done = await self._software.upgrade(progress, InstallHooks(self._try_out, self._adopter(progress)))
        return f"{'upgraded' if done else 'nothing to upgrade'}: {(await self.check()).detail}"

    async def version(self) -> str:
        """The version of the running server, else of the installed one. Raises EngineNotInstalledError."""
        if self._process is not None and self._process.version:
            return self._process.version
        program = self._program if self._program is not None else await in_thread(self._software.find)
        return program.version or str((await self._software.probe(program))["version"])

    async def init_env(self) -> None:
        """Create the directories, and end the processes that a killed plugin left."""
        await in_thread(private_data_dir, self._data)
        for folder in (self._data / "models", self._data / "run"):
            await in_thread(private_folder, folder)
        await in_thread(self._records.reap)

    def config(self) -> EngineConfig:
        """The address and paths of the server."""
        executable = Path(self._program.executable) if self._program else Path("ollama")
        return EngineConfig(
            host=self._process.address.removeprefix("http://") if self._process else "",
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
        program, self._hold = await in_thread(self._software.acquire)
        try:
            await self.init_env()
            process = await self._start_process(program, mode)
        except BaseException:
            self._hold.release()
            raise
        self._process, self._program, self._mode = process, program, mode
        log.info("the managed Ollama %s is ready at %s, mode %s", process.version, process.address, mode)

    async def _start_process(self, program: Backend, mode: str) -> OllamaProcess:
        process = self._new_process(program, mode)
        try:
            await process.ensure_ready()
        except BaseException:
            await process.close()
            raise
        return process

    async def ensure_ready(self) -> None:
        """Restart the process if it has failed. Raises EnginePluginError if it does not become ready."""
        if self._process is not None:
            await self._process.ensure_ready()

    async def change_mode(self, mode: str) -> None:
        """Restart the server in another mode; `auto` keeps the present one."""
        if mode not in ("auto", self._mode) and self._program is not None:
            await self._restart(self._program, mode)

    async def stop(self) -> None:
        """Stop the process and all its descendants."""
        process, self._process = self._process, None
        self._program = None
        if process is not None:
            await process.close()
        self._hold.release()

    async def health(self) -> Health:
        """The state of the process."""
        process = self._process
        if process is None:
            return Health.dead(catalogue.ENGINE_NOT_RUNNING.error())
        if wrong := await process.complaint():
            return Health(HealthState.DEAD if process.failed else HealthState.DEGRADED, wrong)
        return Health(HealthState.READY, f"managed Ollama {process.version} at {process.address}")

    # Replacement of the process

    def _new_process(self, program: Backend, mode: str) -> OllamaProcess:
        return OllamaProcess(program, self._options, self._records, self._data, self._environ, mode)

    async def _try_out(self, program: Backend) -> None:
        await trial_run(program, self._options, self._records, self._environ)

    def _adopter(self, progress: Progress) -> Callable[[], Awaitable[None]]:
        async def adopt() -> None:
            """Restart a running server with the version that is installed now; a stopped one stays stopped."""
            before = self._program
            if before is None:
                return
            found, hold = await in_thread(self._software.acquire)
            if self._program is None or found == before:
                hold.release()
                return
            progress("restarting the server with the new version")
            old, self._hold = self._hold, hold
            try:
                await self._restart(found, self._mode)
            except BaseException:  # the old version runs again
                self._hold = old
                hold.release()
                raise
            old.release()

        return adopt

    async def _restart(self, program: Backend, mode: str) -> None:
        """Replace the process by one with another program or mode, and load the same models. Drains requests first.

        The two cannot run side by side, since they share the models directory. If the new one does not become ready,
        the old one is started again.
        """
        async with self._replacing:
            old, before = self._process, (self._program, self._mode)
            if old is None or before == (program, mode):  # stopped, or replaced already
                return
            loaded = await _loaded_models(old)
            if not await comes_true(old.client().wait_idle(), within=self._options.drain_timeout):
                log.warning("requests did not end in %g s and are aborted", self._options.drain_timeout)
            await old.close()
            if self._process is old:  # not stopped meanwhile
                await self._start_or_revert(program, mode, before)
                await self._reload(loaded)

    async def _start_or_revert(self, program: Backend, mode: str, before: tuple[Backend | None, str]) -> None:
        process = self._process = self._new_process(program, mode)
        self._program, self._mode = program, mode
        try:
            await process.ensure_ready()
        except EnginePluginError:
            await process.close()
            if self._process is process and before[0] is not None:  # not stopped meanwhile
                self._process = self._new_process(before[0], before[1])
                self._program, self._mode = before
                await self._process.ensure_ready()
            raise

    async def _reload(self, names: list[str]) -> None:
        """Load the models again.

        A failure is logged only: the next call of the model loads it or reports the error.
        """
        for name in names:
            process = self._process
            if process is None:  # stopped meanwhile
                return
            try:
                await _load(process.client(), name)
            except EnginePluginError as error:
                log.warning("%s was not loaded again: %s", name, error)


async def _loaded_models(process: OllamaProcess) -> list[str]:
    """The names of the loaded models; [] if the server does not answer."""
    try:
        return [entry["name"] for entry in named_entries(await process.client().ask("GET", "/api/ps"))]
    except EnginePluginError:
        return []


async def _load(client: OllamaClient, name: str) -> None:
    """Load a chat model, or else an embedding model, which /api/generate rejects."""
    try:
        await client.ask("POST", "/api/generate", {"model": name, "stream": False}, model=name, within=_LOAD_TIMEOUT)
    except InvalidRequestError:
        await client.ask("POST", "/api/embed", {"model": name, "input": []}, model=name, within=_LOAD_TIMEOUT)
