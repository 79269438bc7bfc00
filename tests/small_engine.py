"""An engine inside the test's own process, which does what its request says."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.download.events import ChunkProgress, Success
from engine_plugin.engines.base import Engine, Health, HealthState
from engine_plugin.errors import EnginePluginError
from engine_plugin.messages import ConversationMessage
from engine_plugin.protocol.shapes import EngineCheck, EngineConfig

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from engine_plugin.download.events import PullEvent
    from engine_plugin.manifest import Manifest
    from engine_plugin.models.store import ModelInfo, PullRequest

__all__ = ["SmallEngine"]


class SmallEngine(Engine):
    """`failing` maps a method's name to what it raises; `hang` in a request makes it wait for ever.

    `working` is set while a request hangs, `ended` when its work was cleaned up.
    """

    services: ClassVar[frozenset[str]] = frozenset({"chat", "embed", "rerank", "speech-to-text-ws"})

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.failing: dict[str, BaseException] = {}
        self.modes: list[str] = []
        self.working = asyncio.Event()
        self.ended = asyncio.Event()
        self.requests: list[dict[str, Any]] = []
        self.state = HealthState.READY
        self.closed = False

    def _step(self, name: str) -> None:
        if name in self.failing:
            raise self.failing[name]

    async def _hang(self) -> None:
        self.working.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.working.clear()
            self.ended.set()

    async def check(self) -> EngineCheck:
        self._step("check")
        return EngineCheck(True, "small 1")

    async def install(self, progress: Callable[[str], None], *, cover: bool) -> str:
        progress("installing")
        self._step("install")
        return f"small 1 cover={cover}"

    async def upgrade(self, progress: Callable[[str], None]) -> str:
        progress("upgrading")
        self._step("upgrade")
        return "small 1"

    async def init_env(self) -> None:
        self._step("init_env")

    async def version(self) -> str:
        self._step("version")
        return "1"

    def config(self) -> EngineConfig:
        self._step("config")
        return EngineConfig(device_type="cpu")

    async def start(self, mode: str) -> None:
        self.modes.append(mode)
        if mode == "gpu" and "hang" in self.failing:
            await self._hang()
        self._step("start")

    async def stop(self) -> None:
        self._step("stop")

    async def aclose(self) -> None:
        self.closed = True

    async def health(self) -> Health:
        self._step("health")
        return Health(self.state, "as told")

    async def list_models(self) -> Sequence[ModelInfo]:
        self._step("list_models")
        return []

    async def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        self._step("pull_model")
        yield ChunkProgress("sha256:0", 1, 2)
        if request.model == "hang":
            await self._hang()
        if request.model != "endless":
            yield Success(request.model, 2, "sha256:0")

    async def delete_model(self, name: str) -> None:
        self._step("delete_model")

    async def load_model(self, name: str) -> None:
        self._step("load_model")

    async def unload_model(self, name: str) -> None:
        if name == "hang":
            await self._hang()
        self._step("unload_model")

    async def running_models(self) -> Sequence[ModelInfo]:
        self._step("running_models")
        return []

    async def default_model(self, service: str) -> str:
        return "" if service == "rerank" else "small"

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        self.requests.append(request)
        if request.get("hang"):
            await self._hang()
        self._step("call")
        return json.dumps({"service": service, "model": request["model"]}).encode()

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        self.requests.append(request)
        self._step("stream")

        async def chunks() -> AsyncIterator[bytes]:
            for number in range(request.get("chunks", 2)):
                yield b'data: {"n":%d}\n\n' % number
            if request.get("hang"):
                await self._hang()
            self._step("chunk")
            yield b"data: [DONE]\n\n"

        try:
            yield chunks()
        finally:
            self.ended.set()

    @asynccontextmanager
    async def converse(
        self, service: str, messages: AsyncIterator[ConversationMessage], default_model: str
    ) -> AsyncIterator[AsyncIterator[ConversationMessage]]:
        self._step("converse")

        async def answers() -> AsyncIterator[ConversationMessage]:
            async for message in messages:
                if message.data == b"hang":
                    await self._hang()
                if message.data == b"fail":
                    raise EnginePluginError("the engine does not understand")
                yield ConversationMessage(
                    message.data[::-1],
                    message.message_type,
                    {"service": service, "model": default_model, **message.metadata},
                )
                if message.data == b"enough":
                    return

        try:
            yield answers()
        finally:
            self.ended.set()
