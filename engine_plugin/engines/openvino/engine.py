"""The OpenVINO engine: its software, its models on disk, and the one server that holds those in memory."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin import catalogue
from engine_plugin.engines.base import not_bidirectional
from engine_plugin.engines.local.admission import Admission
from engine_plugin.engines.local.driver import Condition, Driver
from engine_plugin.engines.local.pool import ModelPool
from engine_plugin.engines.openvino.client import complaint_error
from engine_plugin.engines.openvino.graphs import remove_stale
from engine_plugin.engines.openvino.models import model_store
from engine_plugin.engines.openvino.options import OpenVinoOptions, devices_asked
from engine_plugin.engines.openvino.requests import API, PATHS, STREAMED, completed_event, upstream_body
from engine_plugin.engines.openvino.server import SERVED, OpenVinoServer, ServedModel
from engine_plugin.engines.openvino.software import OpenVinoSoftware
from engine_plugin.errors import EnginePluginError, UnavailableError
from engine_plugin.models.info import KIND_OF_SERVICE
from engine_plugin.openai_api.bodies import slots_needed
from engine_plugin.openai_api.pictures import require_format
from engine_plugin.speech.services import SpeechServices
from engine_plugin.system.files import in_thread
from engine_plugin.transport.answers import ANSWER_LIMIT, stream_events

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from engine_plugin.engines.local.server import Place
    from engine_plugin.engines.openvino.client import ServerClient
    from engine_plugin.engines.openvino.server import ModelState
    from engine_plugin.install.software import Backend
    from engine_plugin.manifest import Manifest
    from engine_plugin.messages import ConversationMessage
    from engine_plugin.models.store import StoredModel
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["OpenVinoEngine"]

log = logging.getLogger(__name__)

_STATES_TIMEOUT = 2.0
_MB = 1024 * 1024
_PROCESS = 48 * _MB
"""Bytes that a worker needs besides its model's files, measured with the smallest model."""
_AT_ONCE = 4
"""Requests that a model with one at a time gets at once, so that the next one begins without delay."""


class OpenVinoEngine(Driver[ServedModel]):
    """`Engine` on OpenVINO. Start starts the server, which loads each model on its first use."""

    services: ClassVar[frozenset[str]] = frozenset(KIND_OF_SERVICE)
    options_class = OpenVinoOptions
    _options: OpenVinoOptions
    title: ClassVar[str] = "OpenVINO"

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        options = self._options
        self.software = OpenVinoSoftware(options, self.data, self._environ)
        self.store = model_store(self.data / "models", options.hub, self._environ)
        self.pool = ModelPool(
            options.max_loaded_models, options.drain_timeout, self._new_model, options.memory_limit * _MB
        )
        self.server: OpenVinoServer | None = None
        self._only_cpu = False

    # Life

    def require_device(self, mode: str, devices: list[dict[str, Any]] | None, backend: Backend) -> None:
        if devices is None:
            return
        found = [device["name"] for device in devices]
        for where, device in devices_asked(mode, self._options).items():
            one_of_them = device.removesuffix(".0")  # one GPU alone is called GPU
            if not any(name in (device, one_of_them) or name.partition(".")[0] == device for name in found):
                names = ", ".join(f"{device['name']} ({device['description']})" for device in devices) or "none"
                way = "Start in mode auto or cpu" if where == "mode" else "Correct plugin.yaml, start in mode cpu"
                raise catalogue.DEVICE_MISSING.error(
                    where=where,
                    asked=device,
                    software=backend.origin,
                    device=device,
                    devices=names,
                    way=f"{way}, or install the driver that OpenVINO needs for it",
                )

    async def begin(self, backend: Backend, mode: str, devices: list[dict[str, Any]] | None) -> None:
        await in_thread(remove_stale, self.data / SERVED)
        self._only_cpu = devices is not None and all(device["name"] == "CPU" for device in devices)
        self.server = self._new_server(backend, mode, self._place)
        await self.server.ensure_ready()

    async def renew(self) -> None:
        before, backend = self.server, self.backend
        if before is None or backend is None:
            return  # a stop came first
        self.server = server = self._new_server(backend, self._mode, self._place)
        await self.pool.drain()  # models load into the new server from now on
        await before.close()
        await server.ensure_ready()

    async def end(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            await server.close()

    async def try_out(self, backend: Backend, model: StoredModel, place: Place) -> None:
        server = self._new_server(backend, "cpu", place)
        try:
            loaded = self._loaded_model(model, server)
            await loaded.ensure_ready()
            body = json.dumps({"model": model.name, "prompt": "a", "max_tokens": 1}).encode()
            async with loaded.working() as client, client.post_json(PATHS["generate"], body) as response:
                await response.read(ANSWER_LIMIT)
        finally:
            await server.close()

    async def condition(self) -> Condition:
        server = self.server
        if server is None:
            return Condition(["the OpenVINO server is not running"], serves=False)
        return await server.condition([one.model.name for one in self.pool.all_servers() if one.loaded])

    async def revive(self) -> Sequence[StoredModel]:
        server = self._require_server()
        await server.ensure_ready()
        states = await self._states(server)
        if states is None:
            return []
        loaded = [one for one in self.pool.all_servers() if one.loaded]
        for one in loaded:
            if one.model.name not in states or states[one.model.name].failed:
                one.doubt()
        return [one.model for one in loaded if not one.ready]

    async def memory(self) -> Mapping[str, int]:
        server = self.server
        states = await self._states(server) if server is not None and server.ready else None
        return {name: state.memory for name, state in (states or {}).items()}

    @staticmethod
    async def _states(server: OpenVinoServer) -> dict[str, ModelState] | None:
        """The state of each model; None from a server that is busy, or hangs and will be killed."""
        try:
            async with asyncio.timeout(_STATES_TIMEOUT):
                return await server.states()
        except (EnginePluginError, TimeoutError) as error:
            log.debug("the server does not report its models: %s", error)
            return None

    # Services

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        if service in PATHS:
            async with self._exchange(service, request, stream=False) as response:
                return await _answer(response, request)
        async with self._client_for(service, request) as client:
            if service == "text-to-speech":
                return await self._speech.speak(client, request["model"], request)
            return await self._speech.transcribe(client, request["model"], request)

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        if service not in STREAMED:
            raise catalogue.STREAM_UNSUPPORTED.error(service=service, engine="OpenVINO")
        streams = service != "text-to-image" or self._require_server().is_ours
        async with self._exchange(service, request, stream=streams) as response:
            if streams:
                yield stream_events(response, complaint_error, longest=ANSWER_LIMIT)
            else:
                yield _at_its_end(response, request)

    @asynccontextmanager
    async def converse(
        self, service: str, messages: AsyncIterator[ConversationMessage], default_model: str
    ) -> AsyncIterator[AsyncIterator[ConversationMessage]]:
        if service != "speech-to-text-ws":
            raise not_bidirectional(service)

        @asynccontextmanager
        async def use(name: str) -> AsyncIterator[tuple[ServerClient, str]]:
            model = await self._model_for(service, name)
            async with self.pool.use(model) as loaded, loaded.working() as client:
                yield client, model.name

        async with self._speech.converse(use, default_model, messages) as answers:
            yield answers

    @property
    def _speech(self) -> SpeechServices:
        return SpeechServices(API, self._require_server().decoder, self.data / "output", self._options.live)

    @asynccontextmanager
    async def _exchange(self, service: str, request: dict[str, Any], *, stream: bool) -> AsyncIterator[HttpResponse]:
        """The server's answer to a request, with the model held in memory and its turns taken for the block."""
        async with self._client_for(service, request) as client:
            largest = self._options.image.get("max_resolution", "")
            body = upstream_body(service, request, largest, stream=stream)
            async with client.post_json(PATHS[service], body) as response:
                yield response

    @asynccontextmanager
    async def _client_for(self, service: str, request: dict[str, Any]) -> AsyncIterator[ServerClient]:
        """A client of the server that has the request's model in memory, for as long as the request takes."""
        model = await self._model_for(service, request["model"])
        request["model"] = model.name  # the caller may have given a reference
        async with self.pool.turn(model, slots_needed(service, request)) as loaded:
            await loaded.ensure_ready()  # the server may have died while this request waited for its turn
            async with loaded.working() as client:
                yield client

    def _new_model(self, model: StoredModel) -> ServedModel:
        """A model for the pool. Raises UnavailableError when the engine does not run."""
        server = self._require_server()
        if server.is_ours:
            self._require_memory(model, _PROCESS, model.size if self._only_cpu or self._mode == "cpu" else 0)
        return self._loaded_model(model, server)

    def _require_server(self) -> OpenVinoServer:
        """The server. Raises UnavailableError when the engine does not run."""
        self._require_running()
        if self.server is None:
            raise UnavailableError("the engine is being stopped")
        return self.server

    def _loaded_model(self, model: StoredModel, server: OpenVinoServer) -> ServedModel:
        many, queue = self._options.parallel, self._options.max_queue
        at_once = many if model.kind in ("chat", "embed", "rerank") else min(many, _AT_ONCE)
        return ServedModel(model, server.entry(model), server, Admission(at_once, queue))

    def _new_server(self, backend: Backend, mode: str, place: Place) -> OpenVinoServer:
        return OpenVinoServer(backend, self._options, place, self.data, mode=mode, only_cpu=self._only_cpu)


async def _at_its_end(response: HttpResponse, request: dict[str, Any]) -> AsyncIterator[bytes]:
    """A stream of one event, for a server that does not report the progress of a picture."""
    yield completed_event(await _answer(response, request))


async def _answer(response: HttpResponse, request: dict[str, Any]) -> bytes:
    """The whole answer. Raises the error of `require_format` for pictures in another format than requested."""
    data = await response.read(ANSWER_LIMIT)
    require_format(data, request.get("output_format"), "this OpenVINO Model Server")
    return data
