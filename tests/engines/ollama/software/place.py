"""A data directory with Ollama's software, and the managed servers that use it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.engines.ollama.options import OllamaOptions
from engine_plugin.engines.ollama.server_process import OllamaProcess, trial_run
from engine_plugin.engines.ollama.software import OllamaSoftware
from engine_plugin.install.software import Backend, InstallHooks
from engine_plugin.process.records import TOKEN_VARIABLE, ProcessRecords
from tests.engines.llamacpp.running import gone
from tests.engines.ollama.contract.handle import ContractClient
from tests.engines.ollama.contract.release import write_program

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SWIFT", "Place", "StartedServer"]

SWIFT: dict[str, Any] = {"start_timeout": 15, "stop_timeout": 5, "restart_backoff": 0.02}


@dataclass(frozen=True)
class StartedServer:
    """An OllamaProcess, and direct access to the contract server behind it."""

    server: OllamaProcess

    @property
    def contract(self) -> ContractClient:
        """The contract server of the current run."""
        return ContractClient(int(self.server.address.rpartition(":")[2]))

    @property
    def process(self) -> psutil.Process:
        """The process of the server, below its guard."""
        assert self.server.pid is not None
        [program] = psutil.Process(self.server.pid).children()
        return program

    async def load(self, model: str) -> psutil.Process:
        """Load a model and return its runner process."""
        before = set(self.process.children())
        await self.server.client().ask("POST", "/api/chat", {"model": model, "messages": []})
        [runner] = set(self.process.children()) - before
        return runner

    async def names(self) -> list[str]:
        """The names of its models."""
        shape = await self.server.client().ask("GET", "/api/tags")
        return sorted(model["name"] for model in shape["models"])


@dataclass
class Place:
    """A directory `root` with a data directory and servers."""

    root: Path
    environ: dict[str, str]
    progress: list[str] = field(default_factory=list)
    begun: list[OllamaProcess] = field(default_factory=list)
    switched: list[str] = field(default_factory=list)
    """The versions that were activated, in order."""

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.root / "data"

    @property
    def records(self) -> ProcessRecords:
        """The records of running processes."""
        return ProcessRecords(self.data / "run")

    def software(self, **options: Any) -> OllamaSoftware:
        """The software with options of plugin.yaml."""
        return OllamaSoftware(OllamaOptions(**SWIFT, **options), self.data, self.environ)

    async def install(self, software: OllamaSoftware, **options: Any) -> str:
        """InstallEngine."""
        return await software.install(self._tell, self.install_hooks(software, options), cover=False)

    async def upgrade(self, software: OllamaSoftware, **options: Any) -> bool:
        """UpgradeEngine."""
        return await software.upgrade(self._tell, self.install_hooks(software, options))

    def versions(self) -> list[str]:
        """The versions in the data directory."""
        folder = self.data / "software" / "versions"
        return sorted(path.name.rpartition("-")[0] for path in folder.iterdir()) if folder.is_dir() else []

    def program(self, *options: str) -> Backend:
        """An ollama program that the plugin did not install."""
        path = write_program(self.root / f"bin{len(self.begun)}", *options)
        return Backend("ollama", "", f"ollama at {path}", str(path))

    def managed(
        self, *program: str, mode: str = "auto", backend: Backend | None = None, **options: Any
    ) -> StartedServer:
        """A managed process, not started yet. `program` are options of the contract server."""
        given = backend or self.program("--runners", *program)
        wanted = OllamaOptions(**SWIFT | options)
        server = OllamaProcess(given, wanted, self.records, self.data, self.environ, mode)
        self.begun.append(server)
        return StartedServer(server)

    async def close(self) -> None:
        """Stop all servers."""
        await asyncio.gather(*(server.close() for server in self.begun))

    def _tell(self, step: object) -> None:
        if isinstance(step, str):
            self.progress.append(step)

    def install_hooks(self, software: OllamaSoftware, options: dict[str, Any]) -> InstallHooks:
        """The steps of an installation in the engine; `options` are those of the trial."""
        wanted = OllamaOptions(**SWIFT | options)

        async def trial(backend: Backend) -> None:
            await trial_run(backend, wanted, self.records, self.environ)

        async def adopt() -> None:
            self.switched.append(software.find().version)

        return InstallHooks(trial, adopt)


def token_of(process: psutil.Process) -> str:
    """The token of a process; "" without one."""
    return "" if gone(process) else process.environ().get(TOKEN_VARIABLE, "")
