"""The llama.cpp engine: its software, its models on disk, and its models in memory."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.engines import sse
from engine_plugin.engines.base import Engine, EngineCheck, EngineConfig, Health, HealthState
from engine_plugin.engines.llamacpp import assemble, requests
from engine_plugin.engines.llamacpp.models import model_store
from engine_plugin.engines.llamacpp.options import LlamaCppOptions
from engine_plugin.engines.llamacpp.server import PATHS, ModelServer, refusal_error
from engine_plugin.engines.llamacpp.software import Backend, Moves, Software
from engine_plugin.engines.options import option_problems, read_options
from engine_plugin.engines.pool import ModelPool
from engine_plugin.engines.records import ProcessRecords
from engine_plugin.engines.shared import SharedWork
from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    InvalidRequestError,
    ModelInUseError,
    ModelNotFoundError,
    ModelNotLoadedError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.files import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence
    from pathlib import Path

    from engine_plugin.download.events import PullEvent
    from engine_plugin.engines.base import Progress
    from engine_plugin.engines.http1 import HttpResponse
    from engine_plugin.errors import Problem
    from engine_plugin.manifest import Manifest
    from engine_plugin.models.store import ModelInfo, PullRequest

__all__ = ["LlamaCppEngine"]

log = logging.getLogger(__name__)

KIND_OF_SERVICE = {"chat": "chat", "generate": "chat", "embed": "embed", "rerank": "rerank"}
_ANSWER_LIMIT = 512 * 1024 * 1024
_NULL_EVENT = b"data: null\n\n"


class LlamaCppEngine(Engine):
    """`Engine` on llama.cpp. Start makes the software ready; each model gets a process when it is first used."""

    services: ClassVar[frozenset[str]] = frozenset(PATHS)

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self._options = read_options(LlamaCppOptions, manifest)
        self._environ = dict(os.environ)
        self._data = manifest.data_dir
        self._software = Software(self._options, self._data, self._environ)
        self._records = ProcessRecords(self._data / "run")
        self._store = model_store(self._data / "models", self._software)
        self._pool = ModelPool(self._options.max_loaded_models, self._options.drain_timeout, self._server_of_ours)
        self._starting: SharedWork[None] = SharedWork("starting llama.cpp")
        self._installing: SharedWork[str] = SharedWork("installing llama.cpp")
        self._backend: Backend | None = None
        self._mode = "auto"
        self._sockets: Path | None = None
        self._cleanup = ExitStack()
        self._lifecycle = asyncio.Lock()

    @staticmethod
    def check_options(manifest: Manifest) -> Sequence[Problem]:
        """What is wrong with the `engine:` section. Called by `engine-plugin lint`."""
        return option_problems(LlamaCppOptions, manifest)

    # Software

    async def check(self) -> EngineCheck:
        return await asyncio.to_thread(self._software.check)

    async def install(self, progress: Progress, *, cover: bool) -> str:
        return await self._installing.run(lambda: self._install(progress, cover=cover))

    async def _install(self, progress: Progress, *, cover: bool) -> str:
        return await self._software.install(progress, self._moves(progress), cover=cover)

    async def upgrade(self, progress: Progress) -> str:
        return await self._installing.run(lambda: self._upgrade(progress))

    async def _upgrade(self, progress: Progress) -> str:
        done = await self._software.upgrade(progress, self._moves(progress))
        return f"{'upgraded' if done else 'nothing to upgrade'}: {(await self.check()).detail}"

    def _moves(self, progress: Progress) -> Moves:
        """What an installation asks of us. The models that were loaded are loaded again, after a failure too."""
        loaded: dict[str, ModelInfo] = {}

        async def adopt() -> None:
            loaded.update({server.model.name: server.model for server in self._pool.servers()})
            await self._adopt(list(loaded), progress)

        return Moves(self._trial, adopt)

    async def _trial(self, backend: Backend) -> None:
        """Have new software answer with a sample, beside what runs. Raises EngineStartError."""
        model = await self._store.get(self._store.default_for("chat"))
        await self.init_env()
        with ExitStack() as cleanup:
            folder = await in_thread(self._private_folder, cleanup) if self._use_unix_sockets() else None
            server = self._new_server(model, backend, folder)
            try:
                await server.ensure_ready()
            finally:
                await server.stop()
                server.clean_up()

    async def _adopt(self, models: list[str], progress: Progress) -> None:
        """Have a running engine use what is installed now, with `models` loaded; one that is stopped stays so."""
        if self._backend is None or self._backend == self._software.find():
            return
        progress("moving the running engine to the new version")
        self._backend = self._software.find()
        await self._pool.drain()
        for name in models:
            try:
                with suppress(ModelNotFoundError):  # deleted meanwhile
                    await self._pool.load(await self._store.get(name))
            except EnginePluginError:
                if self._backend is not None:  # else a stop ended it
                    raise

    async def init_env(self) -> None:
        for folder in (self._data, self._data / "models", self._data / "run"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        await asyncio.to_thread(self._records.reap)

    async def version(self) -> str:
        backend = self._software.find()
        return backend.version or str((await self._software.probe(backend))["version"])

    def config(self) -> EngineConfig:
        return EngineConfig(
            host="" if self._use_unix_sockets() else "127.0.0.1",  # a private socket has no host to show
            scheme="http",
            recommend_model=self.default_model("chat"),
            download_path=str(self._software.folder),
            engine_path=str(self._data),
            exec_path=os.path.dirname(sys.executable),  # noqa: PTH120  # the wire wants the text
            exec_file=os.path.basename(sys.executable),  # noqa: PTH119
            device_type=self._mode,
        )

    # Life

    async def start(self, mode: str) -> None:
        if self._backend is None:
            await self._starting.run(lambda: self._start(mode))
        await self._change_mode(mode)  # also for one who joined the start of another

    async def _start(self, mode: str) -> None:
        async with self._lifecycle:  # a stop under way ends first
            await self._make_ready(mode)

    async def _make_ready(self, mode: str) -> None:
        backend = self._software.find()
        await self.init_env()
        probed = await self._software.probe(backend)
        _require_device(mode, probed["devices"], backend)
        if self._use_unix_sockets() and self._sockets is None:
            self._sockets = await in_thread(self._private_folder, self._cleanup)  # ends before a stop cleans it up
        self._mode, self._backend = mode, backend
        log.info("llama.cpp is ready: %s, version %s, mode %s", backend.origin, probed["version"], mode)

    async def _change_mode(self, mode: str) -> None:
        """An explicit other device moves the engine there; auto is content with what runs."""
        if mode in ("auto", self._mode) or self._backend is None:
            return
        _require_device(mode, (await self._software.probe(self._backend))["devices"], self._backend)
        self._mode = mode
        await self._pool.drain()

    async def stop(self) -> None:
        await self._starting.cancel()
        async with self._lifecycle:
            self._backend = None
            await self._pool.close()
            self._sockets = None
            await asyncio.to_thread(self._cleanup.close)

    async def aclose(self) -> None:
        await self._installing.cancel()
        await self.stop()
        await self._store.aclose()

    async def health(self) -> Health:
        if self._backend is None:
            return Health(HealthState.DEAD, "the engine is not running: call StartEngine")
        complaints = await asyncio.gather(*(server.complaint() for server in self._pool.all_servers()))
        wrong = [complaint for complaint in complaints if complaint]
        if wrong:
            return Health(HealthState.DEGRADED, "; ".join(wrong))
        return Health(HealthState.READY, f"{len(self._pool.servers())} models loaded")

    # Models

    async def list_models(self) -> Sequence[ModelInfo]:
        return await self._store.list()

    def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        return self._store.pull(request)

    async def delete_model(self, name: str) -> None:
        with suppress(ModelNotFoundError):  # there may be an unfinished pull of it, which the store deletes too
            await self._let_go(await self._store.get(name))
        await self._store.delete(name)

    async def _let_go(self, model: ModelInfo) -> None:
        users = self._pool.users(model.name)
        if users:
            raise ModelInUseError(f"model: {model.name} is answering {users} requests; delete it when they are done")
        if not model.bundled:  # the store refuses to delete those, so they may stay in memory
            with suppress(ModelNotLoadedError):
                await self._pool.unload(model.name)

    async def load_model(self, name: str) -> None:
        self._require_running()
        await self._pool.load(await self._store.get(name))

    async def unload_model(self, name: str) -> None:
        model = await self._store.get(name)
        await self._pool.unload(model.name)

    async def running_models(self) -> Sequence[ModelInfo]:
        return [server.model for server in self._pool.servers()]

    # Services

    def default_model(self, service: str) -> str:
        return self._store.default_for(KIND_OF_SERVICE[service]) if service in KIND_OF_SERVICE else ""

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        async with self._exchange(service, request, stream=False) as response:
            if service in ("embed", "rerank"):
                answer = await response.read(_ANSWER_LIMIT)
                shape = requests.embeddings_answer if service == "embed" else requests.rerank_answer
                return shape(answer, request)
            blocks = [block async for block in self._events(response)]
        events = sse.event_data(b"".join(blocks))
        assembled = assemble.chat_completion if service == "chat" else assemble.text_completion
        return assembled(events, requests.choices_wanted(request))

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        if service not in ("chat", "generate"):
            raise UnsupportedError(f"{service}: llama.cpp does not stream this service; call InvokeService")
        async with self._exchange(service, request, stream=True) as response:
            yield self._events(response)

    @asynccontextmanager
    async def _exchange(self, service: str, request: dict[str, Any], *, stream: bool) -> AsyncIterator[HttpResponse]:
        """From the model's name to the head of the engine's answer, holding the model and its slots."""
        self._require_running()
        model = await self._store.get(request["model"])
        wanted = KIND_OF_SERVICE[service]
        if model.kind != wanted:
            raise InvalidRequestError(
                f"model: {model.name} is a model for {model.kind}; {service} needs one for {wanted}"
            )
        body = requests.upstream_body(service, request, stream=stream)
        async with (
            self._pool.use(model) as server,
            server.admission.slots(requests.slots_needed(service, request)),
        ):
            await server.recovered()
            async with server.post(service, body) as response:
                yield response

    async def _events(self, response: HttpResponse) -> AsyncIterator[bytes]:
        """Whole events as they come. An error event becomes an exception, after what came before it."""
        last = b""
        async for arrived in sse.whole_events(response):
            block = arrived.replace(_NULL_EVENT, b"")  # llama.cpp sends it among the events of a list of prompts
            if not block:
                continue
            error_at = sse.error_event(block)
            if error_at >= 0:
                if error_at:
                    yield block[:error_at]
                raise _stream_error(block[error_at:])
            yield block
            last = block
        if sse.DONE not in last:
            raise BadGatewayError("the engine's stream ended before it was done")

    def _server_of_ours(self, model: ModelInfo) -> ModelServer:
        return self._new_server(model, self._require_running(), self._sockets)

    def _new_server(self, model: ModelInfo, backend: Backend, folder: Path | None) -> ModelServer:
        return ModelServer(
            model,
            backend,
            self._options,
            gpu_layers=0 if self._mode == "cpu" else self._options.gpu_layers,
            folder=folder,
            records=self._records,
            environ=self._environ,
        )

    def _private_folder(self, cleanup: ExitStack) -> Path:
        """A directory for the engine's sockets, until `cleanup`. Sweeps what killed plugins left, too."""
        if sys.platform != "win32":
            from engine_plugin.socketdir import private_directory

            return cleanup.enter_context(private_directory(base="", group=""))
        raise UnsupportedError("engine.transport: there are no unix sockets on Windows; use auto or tcp")

    def _require_running(self) -> Backend:
        """What runs. Raises UnavailableError before a start and after a stop."""
        if self._backend is None:
            raise UnavailableError(_NOT_RUNNING)
        return self._backend

    def _use_unix_sockets(self) -> bool:
        return self._options.transport == "unix" or (self._options.transport == "auto" and sys.platform != "win32")


_NOT_RUNNING = "the engine is not running: call StartEngine (engine-plugin engine start)"


def _require_device(mode: str, devices: list[dict[str, Any]] | None, backend: Backend) -> None:
    if mode == "npu":
        raise UnsupportedError("mode: llama.cpp does not compute on an NPU; start in mode auto, cpu or gpu")
    if mode == "gpu" and devices is not None and all(device["type"] == "CPU" for device in devices):
        names = ", ".join(device["description"] for device in devices) or "none"
        raise PreconditionError(
            f"mode: gpu was asked for, but {backend.origin} sees no GPU (devices: {names}). "
            "Start in mode auto or cpu, or configure a llama-server built for your GPU (engine.llama_server)"
        )


def _stream_error(block: bytes) -> Exception:
    shape = next(iter(sse.event_data(block)), {}).get("error")
    if not isinstance(shape, dict):
        return BadGatewayError(f"the engine reported an error inside its stream: {block[:300]!r}")
    code = shape.get("code")
    return refusal_error(
        code if isinstance(code, int) else 500, str(shape.get("message") or json.dumps(shape)), shape
    )
