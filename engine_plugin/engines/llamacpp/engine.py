"""The driver of llama.cpp."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin import catalogue
from engine_plugin.engines.llamacpp import requests
from engine_plugin.engines.llamacpp.models import model_store
from engine_plugin.engines.llamacpp.options import LlamaCppOptions, served_context
from engine_plugin.engines.llamacpp.server import PATHS, LlamaCppServer, complaint_error
from engine_plugin.engines.llamacpp.software import LlamaCppSoftware
from engine_plugin.engines.local.driver import Condition, Driver
from engine_plugin.engines.local.pool import ModelPool
from engine_plugin.errors import UnsupportedError
from engine_plugin.jsontext import write_request
from engine_plugin.openai_api.assemble import assembled
from engine_plugin.openai_api.bodies import slots_needed
from engine_plugin.openai_api.completions import CompletionLogprobs, wants_logprobs
from engine_plugin.openai_api.ranking import ranked_answer
from engine_plugin.process import tree
from engine_plugin.system.files import in_thread
from engine_plugin.transport.answers import ANSWER_LIMIT, stream_events

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from engine_plugin.engines.local.server import Place
    from engine_plugin.install.software import Backend
    from engine_plugin.manifest import Manifest
    from engine_plugin.models.info import ModelCapabilities, ModelInfo
    from engine_plugin.models.store import StoredModel
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["LlamaCppEngine"]

_PROCESS = 16 * 1024 * 1024
"""Bytes that a process takes in addition to its model, as measured."""

_NULL_EVENT = b"data: null\n\n"
"""An event without content that llama.cpp sends for a list of prompts."""


class LlamaCppEngine(Driver[LlamaCppServer]):
    """`Engine` on llama.cpp. StartEngine checks the software; each model gets a process when it is loaded."""

    services: ClassVar[frozenset[str]] = frozenset(PATHS)
    options_class = LlamaCppOptions
    _options: LlamaCppOptions
    title: ClassVar[str] = "llama.cpp"

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        options = self._options
        self.software = software = LlamaCppSoftware(options, self.data, self._environ)
        self.store = model_store(self.data / "models", software)
        self.pool = ModelPool(options.max_loaded_models, options.drain_timeout, self._create_server)

    def require_device(self, mode: str, devices: list[dict[str, Any]] | None, backend: Backend) -> None:
        if mode == "npu":
            raise UnsupportedError("mode: llama.cpp does not support NPUs. Start in mode auto, cpu or gpu")
        if mode == "gpu" and devices is not None and all(device["type"] == "CPU" for device in devices):
            names = ", ".join(device["description"] for device in devices) or "none"
            raise catalogue.DEVICE_MISSING.error(
                where="mode",
                asked="gpu",
                software=backend.origin,
                device="GPU",
                devices=names,
                way="Start in mode auto or cpu, or configure a llama-server built for your GPU (engine.llama_server)",
            )

    async def try_out(self, backend: Backend, model: StoredModel, place: Place) -> None:
        server = self._new_server(model, backend, place)
        try:
            await server.ensure_ready()
        finally:
            await server.close()
            server.clean_up()

    async def condition(self) -> Condition:
        servers = self.pool.all_servers()
        complaints = await asyncio.gather(*(server.complaint() for server in servers))
        serves = not servers or not all(server.failed for server in servers)
        return Condition([complaint for complaint in complaints if complaint], serves)

    async def revive(self) -> Sequence[StoredModel]:
        return [server.model for server in self.pool.all_servers() if server.broken]

    # Models

    def capabilities(self, model: ModelInfo) -> ModelCapabilities:
        found, served = super().capabilities(model), served_context(model, self._options)
        if found.context_source in ("configuration", "engine") or 0 < found.context_length <= served:
            return found
        return replace(found, context_length=served, context_source="configuration")

    async def memory(self) -> Mapping[str, int]:
        pids = {server.model.name: server.pid for server in self.pool.servers()}
        return await in_thread(lambda: {name: tree.memory(pid) for name, pid in pids.items() if pid is not None})

    def loaded_context(self, model: StoredModel) -> int:
        return served_context(model, self._options)

    def _learn(self, model: StoredModel, reported: ModelCapabilities) -> None:
        """Record the capabilities that a server reports. Only the template of a chat model shows features."""
        features = reported.features if model.kind == "chat" else ()
        self._reported.put(model.name, model.digest, replace(reported, features=features))

    # Services

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        async with self._exchange(service, request, stream=False) as response:
            if service == "embed":
                return requests.embeddings_answer(await response.read(ANSWER_LIMIT), request)
            if service == "rerank":
                return ranked_answer(await response.read(ANSWER_LIMIT), request, raw=True)
            blocks = [block async for block in stream_events(response, complaint_error, _NULL_EVENT)]
        return assembled(service, blocks, request)

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        if service not in ("chat", "generate"):
            raise catalogue.STREAM_UNSUPPORTED.error(service=service, engine="llama.cpp")
        async with self._exchange(service, request, stream=True) as response:
            events = stream_events(response, complaint_error, _NULL_EVENT)
            if wants_logprobs(service, request):
                events = CompletionLogprobs(request["logprobs"]).stream(events)
            yield events

    @asynccontextmanager
    async def _exchange(self, service: str, request: dict[str, Any], *, stream: bool) -> AsyncIterator[HttpResponse]:
        """Send the request and yield the head of the answer, holding the model and its slots."""
        model = await self._model_for(service, request["model"])
        request["model"] = model.name  # the caller may have used another form of the name
        upstream = requests.upstream_request(service, request, stream=stream)
        body = write_request(upstream)
        async with self.pool.turn(model, slots_needed(service, request)) as server:
            await server.recovered()
            if service == "chat":
                await server.require_renderable(upstream)
            async with server.post(service, body) as response:
                yield response

    def _create_server(self, model: StoredModel) -> LlamaCppServer:
        self._require_memory(model, _PROCESS, 0)  # the weights are mapped from the file, so the system can drop them
        return self._new_server(model, self._require_running(), self._place)

    def _new_server(self, model: StoredModel, backend: Backend, place: Place) -> LlamaCppServer:
        layers = 0 if self._mode == "cpu" else self._options.gpu_layers
        return LlamaCppServer(model, backend, self._options, place, layers, self._learn)
