"""A data directory with Ollama's software, and the servers of our own on it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.engines.ollama.options import OllamaOptions
from engine_plugin.engines.ollama.server import ManagedServer, try_out
from engine_plugin.engines.ollama.software import Backend, Moves, Software
from engine_plugin.process.records import TOKEN_VARIABLE, ProcessRecords
from tests.llamacpp.running import gone
from tests.ollama.contract.handle import ContractClient
from tests.ollama.contract.release import write_program

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SWIFT", "Own", "Place"]

SWIFT: dict[str, Any] = {"start_timeout": 15, "stop_timeout": 5, "restart_backoff": 0.02}


@dataclass(frozen=True)
class Own:
    """A server of our own, and the program behind it, which the test may ask past everything of ours."""

    server: ManagedServer

    @property
    def contract(self) -> ContractClient:
        """The contract server of the present life."""
        return ContractClient(int(self.server.address.rpartition(":")[2]))

    @property
    def process(self) -> psutil.Process:
        """The server itself, below its guard."""
        assert self.server.pid is not None
        [program] = psutil.Process(self.server.pid).children()
        return program

    async def load(self, model: str) -> psutil.Process:
        """Have a model in memory: the process that holds it."""
        before = set(self.process.children())
        await self.server.client().ask("POST", "/api/chat", {"model": model, "messages": []})
        [runner] = set(self.process.children()) - before
        return runner

    async def names(self) -> list[str]:
        """The models that it has."""
        shape = await self.server.client().ask("GET", "/api/tags")
        return sorted(model["name"] for model in shape["models"])


@dataclass
class Place:
    """Everything below `root`."""

    root: Path
    environ: dict[str, str]
    progress: list[str] = field(default_factory=list)
    begun: list[ManagedServer] = field(default_factory=list)
    switched: list[str] = field(default_factory=list)
    """The versions that were switched on while this looked, and on again."""

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.root / "data"

    @property
    def records(self) -> ProcessRecords:
        """Of the processes that run."""
        return ProcessRecords(self.data / "run")

    def software(self, **options: Any) -> Software:
        """The software as plugin.yaml asks for it."""
        return Software(OllamaOptions(**SWIFT, **options), self.data, self.environ)

    async def install(self, software: Software, **options: Any) -> str:
        """InstallEngine."""
        return await software.install(self._tell, self._moves(software, options), cover=False)

    async def upgrade(self, software: Software, **options: Any) -> bool:
        """UpgradeEngine."""
        return await software.upgrade(self._tell, self._moves(software, options))

    def versions(self) -> list[str]:
        """What is unpacked below the data directory."""
        folder = self.data / "software" / "versions"
        return sorted(path.name.rpartition("-")[0] for path in folder.iterdir()) if folder.is_dir() else []

    def program(self, *options: str) -> Backend:
        """An ollama that is just there."""
        path = write_program(self.root / f"bin{len(self.begun)}", *options)
        return Backend("", f"ollama at {path}", str(path))

    def own(self, *program: str, mode: str = "auto", backend: Backend | None = None, **options: Any) -> Own:
        """A server of our own, not started yet. `program` are options of the contract server's."""
        given = backend or self.program("--runners", *program)
        wanted = OllamaOptions(**SWIFT | options)
        server = ManagedServer(given, wanted, self.records, self.data, self.environ, mode)
        self.begun.append(server)
        return Own(server)

    async def close(self) -> None:
        """End what runs."""
        await asyncio.gather(*(server.close() for server in self.begun))

    def _tell(self, step: object) -> None:
        if isinstance(step, str):
            self.progress.append(step)

    def _moves(self, software: Software, options: dict[str, Any]) -> Moves:
        wanted = OllamaOptions(**SWIFT | options)

        async def trial(backend: Backend) -> None:
            await try_out(backend, wanted, self.records, self.environ)

        async def adopt() -> None:
            self.switched.append(software.find().version)

        return Moves(trial, adopt)


def token_of(process: psutil.Process) -> str:
    """What tells whose a process is; "" for nobody's."""
    return "" if gone(process) else process.environ().get(TOKEN_VARIABLE, "")
