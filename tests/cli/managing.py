"""An engine with details of its models (kinds, capabilities, memory) that pulls them in layers."""

from __future__ import annotations

import shutil
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from engine_plugin.catalogue import model_missing, near_names
from engine_plugin.download.events import ChunkProgress, PullEvent, StepStarted, Success
from engine_plugin.errors import ModelNotFoundError, UnsupportedError
from engine_plugin.models.info import Loaded, ModelCapabilities

from .fake_engine import FakeEngine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from engine_plugin.models.info import ModelInfo
    from engine_plugin.models.store import PullRequest

KINDS = {"embedder": "embed", "nobody-knows": "", "painter": "text-to-image", "hearer": "speech-to-text"}
CAPABILITIES = {
    "embedder": ModelCapabilities(("embedding",), 512, "file"),
    "guessed": ModelCapabilities(("completion",), 8192, "estimate"),
    "tagged:latest": ModelCapabilities(("completion", "tools"), 40960, "engine"),
    "listener": ModelCapabilities(("completion", "transcription"), 40960, "engine"),
}
LAYERS = {"a": 6000, "b": 3000, "c": 1000}


class ManagingEngine(FakeEngine):
    """The models `guessed` and `embedder` are in memory as soon as they are here."""

    def _info(self, name: str) -> ModelInfo:
        if not (self._models / name).exists() and (self._models / f"{name}:latest").exists():
            name = f"{name}:latest"
        if not (self._models / name).exists():
            names = sorted(path.name for path in self._models.iterdir())
            raise model_missing(name, near=near_names(name, names), here=names, sources="by letter")
        info = super()._info(name)
        kind, capabilities = KINDS.get(name, "chat"), CAPABILITIES.get(name, ModelCapabilities())
        return replace(info, kind=kind, capabilities=capabilities)

    async def running_models(self) -> list[ModelInfo]:
        leaves = datetime.now(UTC) + timedelta(minutes=5, seconds=10)
        loaded = {
            "embedder": Loaded(500_000, idle=12.3),
            "guessed": Loaded(2_000_000_000, 1_500_000_000, expires_at=leaves, context_length=4096),
        }
        here = {info.name: info for info in await self.list_models()}
        return [replace(here[name], loaded=what) for name, what in loaded.items() if name in here]

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        self._log(f"{service} {request['model']}")
        self._info(request["model"])
        async with super().stream(service, request) as chunks:
            yield chunks

    async def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        if request.source.startswith("model:"):
            old = self._info(request.source.removeprefix("model:")).name
            shutil.copy(self._models / old, self._models / request.model)
            yield Success(request.model, 10_000, "sha256:00")
            return
        if request.model == "another's":
            raise UnsupportedError("the models of this server are its owner's")
        if request.model == "nowhere":
            raise ModelNotFoundError("model: no source has 'nowhere'")
        yield StepStarted("pulling manifest")
        for digest, total in LAYERS.items():
            for part in range(5):
                yield ChunkProgress(digest, part * total // 4, total)
        yield StepStarted("pulling manifest")
        yield StepStarted("verifying sha256 digest")
        name = {"owner/big.bin": "big", "tagged": "tagged:latest"}.get(request.model, request.model)
        (self._models / name).write_bytes(b"x" * 10_000)
        yield Success(name, 10_000, "sha256:00")
