"""The managed server: its software, and its process from start to stop, across upgrades and changes of the mode."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.engines.base import Health, HealthState
from engine_plugin.engines.ollama.server_process import OllamaProcess, trial_run
from engine_plugin.engines.ollama.software import OllamaSoftware
from engine_plugin.errors import EnginePluginError
from engine_plugin.install.holds import Hold
from engine_plugin.install.software import InstallHooks
from engine_plugin.process.records import ProcessRecords
from engine_plugin.protocol.shapes import EngineConfig
from engine_plugin.system.files import in_thread, private_data_dir, private_folder
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine_plugin.engines.base import Progress
    from engine_plugin.engines.ollama.client import OllamaClient
    from engine_plugin.engines.ollama.models import ServerModels
    from engine_plugin.engines.ollama.options import OllamaOptions
    from engine_plugin.install.software import Backend
    from engine_plugin.protocol.shapes import EngineCheck

__all__ = ["RELOAD_TIMEOUT", "ManagedServer"]

RELOAD_TIMEOUT = 600.0
"""Seconds in which the models are loaded again after a restart, all of them together; calls wait for that."""

log = logging.getLogger(__name__)


class ManagedServer:
    """An Ollama server that the plugin installs, starts, upgrades and stops.

    Owned by the engine, used from one loop.
    """

    def __init__(
        self, options: OllamaOptions, models: ServerModels, data_dir: Path, environ: Mapping[str, str]
    ) -> None:
        """`models` loads the models again after a restart. No I/O."""
        self._options = options
        self._models = models
        self._data = data_dir
        self._environ = environ
        self._software = OllamaSoftware(options, data_dir, environ)
        self._records = ProcessRecords(data_dir / "run")
        self._process: OllamaProcess | None = None
        self._hold = Hold()
        """The hold on the installed version that the process runs."""
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
        return await self._software.install(progress, self._install_hooks(progress), cover=cover)

    async def upgrade(self, progress: Progress) -> str:
        """Install the wanted version if another one is installed, and return a description of the result."""
        done = await self._software.upgrade(progress, self._install_hooks(progress))
        return f"{'upgraded' if done else 'nothing to upgrade'}: {(await self.check()).detail}"

    def _install_hooks(self, progress: Progress) -> InstallHooks:
        async def trial(program: Backend) -> None:
            await trial_run(program, self._options, self._records, self._environ)

        async def adopt() -> None:
            """Restart a running server with the version that is installed now; a stopped one stays stopped."""
            before = self._process
            if before is None:
                return
            program, hold = await in_thread(self._software.acquire)
            if self._process is None or program == before.backend:
                hold.release()
                return
            progress("restarting the server with the new version")
            old, self._hold = self._hold, hold
            try:
                await self._restart(program, before.mode)
            except BaseException:  # the old version runs again
                self._hold = old
                hold.release()
                raise
            old.release()

        return InstallHooks(trial, adopt)

    async def version(self) -> str:
        """The version of the running server, else of the installed one. Raises EngineNotInstalledError."""
        if self._process is not None and self._process.version:
            return self._process.version
        program = await in_thread(self._software.find)
        return program.version or str((await self._software.probe(program))["version"])

    async def init_env(self) -> None:
        """Create the directories, and end the processes that a killed plugin left."""
        await in_thread(private_data_dir, self._data)
        for folder in (self._data / "models", self._data / "run"):
            await in_thread(private_folder, folder)
        await in_thread(self._records.reap)

    def config(self) -> EngineConfig:
        """The address and paths of the server."""
        process = self._process
        executable = Path(process.backend.executable if process else "ollama")
        return EngineConfig(
            host=process.address.removeprefix("http://") if process else "",
            scheme="http",
            download_path=str(self._software.folder),
            engine_path=str(self._data),
            exec_path=str(executable.parent),
            exec_file=executable.name,
            device_type=process.mode if process else "auto",
        )

    # Life

    async def start(self, mode: str) -> None:
        """Start the server, or a running one's process if it has failed.

        Raises EngineNotInstalledError, EngineStartError.
        """
        if self._process is not None:
            await self._process.ensure_ready()
            return
        await self._software.sweep()
        program, self._hold = await in_thread(self._software.acquire)
        process = self._new_process(program, mode)
        try:
            await self.init_env()
            await process.ensure_ready()
        except BaseException:
            await process.close()
            self._hold.release()
            raise
        self._process = process
        log.info("the managed Ollama %s is ready at %s, mode %s", process.version, process.address, mode)

    async def change_mode(self, mode: str) -> None:
        """Restart the server in another mode; `auto` keeps the present one."""
        if mode != "auto" and self._process is not None:
            await self._restart(self._process.backend, mode)

    async def stop(self) -> None:
        """Stop the process and all its descendants."""
        process, self._process = self._process, None
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

    async def _restart(self, program: Backend, mode: str) -> None:
        """Replace the process by one with another program or mode, and load the same models. Drains requests first.

        The two cannot run side by side, since they share the models directory. If the new one does not become ready,
        the old one is started again.
        """
        async with self._replacing:
            old = self._process
            if old is None or (old.backend, old.mode) == (program, mode):  # stopped, or replaced already
                return
            loaded = await self._loaded_models(old)
            if not await comes_true(old.client().wait_idle(), within=self._options.drain_timeout):
                log.warning("requests did not end in %g s and are aborted", self._options.drain_timeout)
            await old.close()
            if self._process is not old:  # stopped meanwhile
                return
            process = self._process = self._new_process(program, mode)
            try:
                await process.ensure_ready()
            except EnginePluginError:
                await process.close()
                if self._process is process:  # not stopped meanwhile
                    self._process = self._new_process(old.backend, old.mode)
                    await self._process.ensure_ready()
                raise
            await self._reload(process, loaded)

    async def _loaded_models(self, process: OllamaProcess) -> list[str]:
        """The names of the loaded models; [] if the server does not answer."""
        try:
            return [model.name for model in await self._models.running(process.client())]
        except EnginePluginError:
            return []

    async def _reload(self, process: OllamaProcess, names: list[str]) -> None:
        """Load the models again.

        A failure is logged only: the next call of the model loads it or reports the error.
        """
        left = list(names)
        try:
            async with asyncio.timeout(RELOAD_TIMEOUT):
                while left and self._process is process:  # not stopped meanwhile
                    try:
                        await self._models.load(process.client(), left[0])
                    except EnginePluginError as error:
                        log.warning("%s was not loaded again: %s", left[0], error)
                    del left[0]
        except TimeoutError:
            log.warning("%s: not loaded again within %g s", ", ".join(left), RELOAD_TIMEOUT)
