"""An engine for the tests of the command line, whose state is a few files in the data directory."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.catalogue import ENGINE_NOT_RUNNING
from engine_plugin.download.events import ChunkProgress, PullEvent, StepStarted, Success
from engine_plugin.engines.base import Engine, Health, HealthState
from engine_plugin.errors import (
    EngineNotInstalledError,
    EngineStartError,
    ModelNotFoundError,
    ModelNotLoadedError,
    Problem,
    PullError,
    UnavailableError,
)
from engine_plugin.manifest import SERVICE_NAMES
from engine_plugin.messages import ConversationMessage
from engine_plugin.models.store import ModelDescription, ModelInfo, PullRequest
from engine_plugin.protocol.shapes import EngineCheck, EngineConfig

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from engine_plugin.engines.base import Progress
    from engine_plugin.manifest import Manifest


class FakeEngine(Engine):
    """Installed when the file `installed` is there; a model is a file in `models`."""

    services: ClassVar[frozenset[str]] = frozenset(SERVICE_NAMES)

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
        if not self._started:
            return Health.dead(ENGINE_NOT_RUNNING.error())
        return Health(HealthState.READY, "as the test wants it")

    def _info(self, name: str) -> ModelInfo:
        path = self._models / name
        if not path.exists():
            raise ModelNotFoundError(f"model: no model is called {name!r}")
        when = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        details = ModelDescription("bin", "fake", ("fake",), "1M", "Q4_0")
        return ModelInfo(name, "chat", path.stat().st_size, "sha256:00", when, False, details)

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
        yield StepStarted(f"resolving {request.model} {json.dumps(shown)}")
        for part in range(1, 6):
            yield ChunkProgress("sha256:00", part * 1000, 10_000)
        if request.model == "slow":
            try:
                yield StepStarted("waiting for more")
                await asyncio.Event().wait()
            finally:
                self._log("pull ended early")
        if request.model == "broken":
            raise PullError("model: the content is not what sha256 says; pull it again")
        (self._models / request.model).write_bytes(b"x" * 10_000)
        yield ChunkProgress("sha256:00", 10_000, 10_000)
        yield Success(request.model, 10_000, "sha256:00")

    async def delete_model(self, name: str) -> None:
        (self._models / self._info(name).name).unlink()

    async def load_model(self, name: str) -> None:
        self._info(name)
        self._loaded.append(name)

    async def unload_model(self, name: str) -> None:
        if name not in self._loaded:
            raise ModelNotLoadedError(f"model: {name} is not loaded")
        self._loaded.remove(name)

    async def running_models(self) -> list[ModelInfo]:
        return [self._info(name) for name in self._loaded]

    async def default_model(self, service: str) -> str:
        return "tiny"

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        if not self._started:
            raise UnavailableError("the engine is not running")
        if request["model"] == "odd":
            return b'{"data": 1, "results": [{}], "odd": true}'
        self._log(f"{service} {json.dumps(request)}")
        return json.dumps(_answer(service, request)).encode()

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        async def chunks() -> AsyncIterator[bytes]:
            if service == "chat":
                yield b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\n'
            else:
                self._log(f"{service} {json.dumps(request)}")
                total = request.get("num_inference_steps", 2)
                for step in range(1, total + 1):
                    progress = {"type": "image_generation.progress", "step": step, "total": total}
                    yield b"data: %s\n\n" % json.dumps(progress).encode()
                done = {"type": "image_generation.completed", **_answer(service, request)}
                yield b"data: %s\n\n" % json.dumps(done).encode()
            yield b"data: [DONE]\n\n"

        yield chunks()

    @asynccontextmanager
    async def converse(
        self, service: str, messages: AsyncIterator[ConversationMessage], default_model: str
    ) -> AsyncIterator[AsyncIterator[ConversationMessage]]:
        async def answers() -> AsyncIterator[ConversationMessage]:
            heard = b""
            async for message in messages:
                if message.metadata:
                    self._log(f"{service} {json.dumps(dict(message.metadata) | {'default': default_model})}")
                    yield _event("task-started")
                if message.message_type == "text":
                    continue
                heard += message.data
                if heard == b"noise":
                    yield _event("task-failed", error_message="audio: is damaged; send another")
                    return
                text = "語" * 100 + " last words" if heard.startswith(b"talkative") else "one"
                yield _event("result-generated", sentence={"text": text, "is_final": False})
            if heard == b"gone":
                return
            if heard == b"hush":
                yield _event("task-finished")
                return
            sentence = {"text": f" {len(heard)} bytes", "begin_time": 500, "end_time": 3_661_007, "is_final": True}
            yield _event("result-generated", sentence=sentence)
            yield _event("task-finished")

        yield answers()


def _event(event: str, sentence: object = None, **header: str) -> ConversationMessage:
    payload = {"output": {"sentence": sentence}} if sentence else {}
    return ConversationMessage(
        json.dumps({"header": {"task_id": "1", "event": event, **header}, "payload": payload}).encode()
    )


def _answer(service: str, request: dict[str, Any]) -> dict[str, Any]:
    match service:
        case "embed":
            return {"data": [{"embedding": [len(text), 0.5]} for text in request["input"]]}
        case "rerank":
            order = sorted(range(len(request["documents"])), key=lambda at: -len(request["documents"][at]))
            hits = [{"index": at, "relevance_score": 1 / (1 + place)} for place, at in enumerate(order)]
            return {"results": hits[: request.get("top_n", 10)]}
        case "text-to-image":
            pictures = [f"picture {number} of {request['prompt']}" for number in range(request.get("n", 1))]
            return {"created": 1, "data": [{"b64_json": _base64(picture.encode())} for picture in pictures]}
        case "text-to-speech":
            sound = _base64(f"RIFF {request['text']}".encode())
            return {"url": "/tmp/1.wav", "audio": sound, "format": "wav", "duration": 1.25, "model": request["model"]}
        case "speech-to-text":
            text = f"{request['response_format']} of {len(base64.b64decode(request['audio']))} bytes\n"
            return {"text": text, "segments": []}
    return {"asked": request}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
