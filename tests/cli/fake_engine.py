"""An engine for the tests of the command line: all of its state is a few files in the data directory."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.download.events import ChunkProgress, PullEvent, Status, Success
from engine_plugin.engines.base import Engine, EngineCheck, EngineConfig, Health, HealthState
from engine_plugin.errors import (
    EngineNotInstalledError,
    EngineStartError,
    ModelNotFoundError,
    ModelNotLoadedError,
    Problem,
    PullError,
)
from engine_plugin.models.store import ModelDetails, ModelInfo, PullRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from engine_plugin.engines.base import Progress
    from engine_plugin.manifest import Manifest


class FakeEngine(Engine):
    """Installed when the file `installed` is there; a model is a file in `models`."""

    services: ClassVar[frozenset[str]] = frozenset({"chat"})

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self._data = manifest.data_dir
        self._models = self._data / "models"
        self._models.mkdir(parents=True, exist_ok=True)
        self._started = False
        self._loaded: list[str] = []

    @staticmethod
    def check_options(manifest: Manifest) -> Sequence[Problem]:
        if "nonsense" in manifest.engine_options:
            return [manifest.problem(("engine", "nonsense"), "engine.nonsense is no option", "Remove it")]
        return ()

    def _log(self, what: str) -> None:
        with (self._data / "journal").open("a") as journal:
            journal.write(what + "\n")

    async def check(self) -> EngineCheck:
        there = (self._data / "installed").exists()
        return EngineCheck(there, "fake 1.0" if there else "no fake is here")

    async def install(self, progress: Progress, *, cover: bool) -> str:
        progress("fetching fake 1.0")
        for part in range(11):
            progress(ChunkProgress("sha256:00", part * 1000, 10_000))
        (self._data / "installed").write_text(str(cover))
        return "fake 1.0"

    async def upgrade(self, progress: Progress) -> str:
        return await self.install(progress, cover=True)

    async def init_env(self) -> None:
        self._log("init_env")

    async def version(self) -> str:
        return "1.0"

    def config(self) -> EngineConfig:
        return EngineConfig(device_type="cpu")

    async def start(self, mode: str) -> None:
        if not (self._data / "installed").exists():
            raise EngineNotInstalledError("fake is not installed. Install it with InstallEngine.")
        if mode == "gpu":
            raise EngineStartError("there is no GPU; start it with mode cpu")
        self._log(f"start {mode}")
        self._started = True

    async def stop(self) -> None:
        if self._started:
            self._log("stop")
        self._started = False

    async def health(self) -> Health:
        return Health(HealthState.READY if self._started else HealthState.DEAD, "as the test wants it")

    def _info(self, name: str) -> ModelInfo:
        path = self._models / name
        if not path.exists():
            raise ModelNotFoundError(f"model: no model is called {name!r}")
        when = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        details = ModelDetails("bin", "fake", ("fake",), "1M", "Q4_0")
        return ModelInfo(name, path, "chat", path.stat().st_size, "sha256:00", when, False, details)

    async def list_models(self) -> list[ModelInfo]:
        return [self._info(path.name) for path in sorted(self._models.iterdir())]

    async def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        shown = {
            "source": request.source,
            "sha256": request.sha256,
            "insecure": request.insecure,
            "type": request.model_type,
            "username": request.username,
            "password": len(request.password),
        }
        yield Status(f"resolving {request.model} {json.dumps(shown)}")
        for part in range(1, 6):
            yield ChunkProgress("sha256:00", part * 1000, 10_000)
        if request.model == "slow":
            try:
                yield Status("waiting for more")
                await asyncio.Event().wait()
            finally:
                self._log("pull ended early")
        if request.model == "broken":
            raise PullError("model: the content is not what sha256 says; pull it again")
        (self._models / request.model).write_bytes(b"x" * 10_000)
        yield ChunkProgress("sha256:00", 10_000, 10_000)
        yield Success(request.model, 10_000, "sha256:00")

    async def delete_model(self, name: str) -> None:
        self._info(name).path.unlink()

    async def load_model(self, name: str) -> None:
        self._info(name)
        self._loaded.append(name)

    async def unload_model(self, name: str) -> None:
        if name not in self._loaded:
            raise ModelNotLoadedError(f"model: {name} is not loaded")
        self._loaded.remove(name)

    async def running_models(self) -> list[ModelInfo]:
        return [self._info(name) for name in self._loaded]

    def default_model(self, service: str) -> str:
        return "tiny"

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        return json.dumps({"asked": request}).encode()

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        async def chunks() -> AsyncIterator[bytes]:
            yield b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\ndata: [DONE]\n\n'

        yield chunks()
