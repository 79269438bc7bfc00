"""The engine for attached servers with OpenAI's REST API."""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin import catalogue
from engine_plugin.download.events import StepStarted, Success
from engine_plugin.engines.base import Engine, Health, HealthState, not_bidirectional
from engine_plugin.engines.local.admission import Admission
from engine_plugin.engines.openai import requests
from engine_plugin.engines.openai.adapters.base import Reported, likely_kind
from engine_plugin.engines.openai.adapters.ovo import pull_events
from engine_plugin.engines.openai.address import BaseUrl
from engine_plugin.engines.openai.connection import ServerConnection
from engine_plugin.engines.openai.discovery import ServerFinder
from engine_plugin.engines.openai.exchange import Exchange, PeekedResponse, model_missing, no_service
from engine_plugin.engines.openai.options import OpenAIOptions
from engine_plugin.engines.openai.requests import PATHS, STREAMED
from engine_plugin.engines.options import option_problems, read_options
from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    ManifestError,
    ModelNotFoundError,
    PullError,
    UnsupportedError,
)
from engine_plugin.jsontext import answer_object
from engine_plugin.models.capabilities import resolve
from engine_plugin.models.info import KIND_OF_SERVICE
from engine_plugin.openai_api.pictures import require_format
from engine_plugin.openai_api.ranking import ranked_answer
from engine_plugin.process.environ import child_environ
from engine_plugin.protocol.shapes import EngineCheck, EngineConfig
from engine_plugin.system.files import in_thread, private_data_dir
from engine_plugin.transport.answers import ERROR_LIMIT, Complaint
from engine_plugin.transport.http1 import BrokenOffError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from engine_plugin.download.events import PullEvent
    from engine_plugin.engines.base import Progress
    from engine_plugin.engines.openai.adapters.base import ServerAdapter
    from engine_plugin.errors import Problem
    from engine_plugin.manifest import Manifest
    from engine_plugin.messages import ConversationMessage
    from engine_plugin.models.info import ModelInfo
    from engine_plugin.models.store import PullRequest
    from engine_plugin.speech.services import SpeechServices

__all__ = ["OpenAIEngine"]

_NATIVE_TIMEOUT = 60.0  # for requests without computation


class OpenAIEngine(Engine):
    """`Engine` on an attached server, which is found at the first call and again after it was lost.

    StartEngine finds it at once; StopEngine disconnects until the next StartEngine.
    """

    services: ClassVar[frozenset[str]] = frozenset(KIND_OF_SERVICE)

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self._options = options = read_options(OpenAIOptions, manifest)
        if problems := _host_problems(manifest):
            raise ManifestError(problems)
        environ = child_environ(os.environ)
        self._environ = environ
        self._admission = Admission(options.parallel, options.max_queue)
        self._connection = ServerConnection(ServerFinder(options, manifest.provider.engine_host, environ))

    @cached_property
    def _speech(self) -> SpeechServices:
        """Loaded when it is needed: a plugin starts sooner without it."""
        from engine_plugin.speech.decoder import Decoder
        from engine_plugin.speech.services import SpeechServices

        decoder = Decoder(None, self._environ, self._options.audio)
        return SpeechServices("", decoder, self.manifest.data_dir / "output", self._options.live)

    @staticmethod
    def check_options(manifest: Manifest) -> Sequence[Problem]:
        """Check the `engine:` section and engine_host. Called by `engine-plugin lint`."""
        return [*option_problems(OpenAIOptions, manifest), *_host_problems(manifest)]

    # Software

    async def check(self) -> EngineCheck:
        """Always installed; `start` and `health` check whether a server answers."""
        try:
            attachment = await self._connection.get(for_call=False)
        except EnginePluginError as error:
            return EngineCheck(installed=True, detail=f"no installation is needed, but {error}")
        return EngineCheck(installed=True, detail=f"attached to {attachment.title}")

    async def install(self, progress: Progress, *, cover: bool) -> str:  # noqa: ARG002  # no installation
        raise self._not_managed("nor installs")

    async def upgrade(self, progress: Progress) -> str:  # noqa: ARG002
        raise self._not_managed("nor upgrades")

    def _not_managed(self, does: str) -> UnsupportedError:
        return UnsupportedError(
            f"this engine neither starts {does} servers. Start, stop and upgrade {self._connection.where} with "
            "its own commands"
        )

    async def init_env(self) -> None:
        await in_thread(private_data_dir, self.manifest.data_dir)

    async def version(self) -> str:
        attachment = await self._connection.get(for_call=False)
        return attachment.info.version or f"unknown ({attachment.title})"

    def config(self) -> EngineConfig:
        attachment = self._connection.attachment
        base = self._connection.finder.named if attachment is None else attachment.base
        if base is None:
            return EngineConfig()
        return EngineConfig(host=base.authority, origin=base.root, scheme=base.scheme)

    # Life

    async def start(self, mode: str) -> None:  # noqa: ARG002  # the server chooses its device
        await self.init_env()
        await self._connection.reconnect()

    async def stop(self) -> None:
        await self._connection.disconnect()

    async def health(self) -> Health:
        if self._connection.is_released:
            return Health.dead(catalogue.ENGINE_NOT_RUNNING.error())
        try:
            attachment = await self._connection.get()
            await self._connection.finder.require_alive(attachment)
        except EnginePluginError as error:
            self._connection.forget()
            return Health.dead(error)
        return Health(HealthState.READY, f"{attachment.title} serves {len(attachment.info.models)} models")

    # Models

    async def list_models(self) -> Sequence[ModelInfo]:
        attachment = await self._connection.get(fresh=True, for_call=False)
        return [self._info(found) for found in attachment.info.models]

    async def running_models(self) -> Sequence[ModelInfo]:
        return [model for model in await self.list_models() if model.loaded is not None]

    def _info(self, found: ModelInfo) -> ModelInfo:
        kind, details = likely_kind(found), found.details
        capabilities = resolve(
            found.name,
            details.family,
            details.parameter_size,
            kind=kind,
            engine=found.capabilities,
            overrides=self._options.models,
        )
        return replace(found, kind=kind, capabilities=capabilities)

    async def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        attachment = await self._connection.get(fresh=True)
        name = request.model
        here = attachment.model(name)
        if here is not None and not request.source:
            yield StepStarted(f"{attachment.title} has {name}")
            yield Success(name, here.size, "")
            return
        if not attachment.server.pulls:
            raise UnsupportedError(
                f"model: {attachment.title} does not support pulls. Add {name} with the server's own commands; "
                "ListModels lists its models"
            )
        http = attachment.probe.client(attachment.base.port + 1)
        exchange = Exchange(self._connection, attachment, "", name)

        async def ask(path: str, body: bytes | None) -> Reported:
            method = "GET" if body is None else "POST"
            try:
                async with asyncio.timeout(_NATIVE_TIMEOUT), http.request(method, path, body) as response:
                    data = await response.read(ERROR_LIMIT)
            except TimeoutError:
                raise PullError(f"model: {attachment.title} did not answer {path} in {_NATIVE_TIMEOUT:g} s") from None
            if response.status not in (200, 201, 202):
                raise exchange.error_of(Complaint.of_body(response.status, data))
            return Reported(answer_object(data))

        try:
            async with aclosing(pull_events(ask, name, request.source or name)) as events:
                async for event in events:
                    yield event
        finally:
            http.close()
            self._connection.forget(attachment)  # the list of models has changed

    async def delete_model(self, name: str) -> None:
        attachment = await self._connection.get()
        raise UnsupportedError(
            f"model: {name} belongs to {attachment.title}; delete it with the server's own commands"
        )

    async def load_model(self, name: str) -> None:
        """Send a small request if the server loads models on demand; other servers load them at their start."""
        attachment = await self._connection.get(fresh=True)
        found = attachment.model(name)
        if found is None:
            raise model_missing(attachment, name)
        if found.loaded is not None or not attachment.server.loads_on_demand:
            return
        if likely_kind(found) == "embed":
            await self.call("embed", {"model": name, "input": "a"})
        else:
            messages = [{"role": "user", "content": "a"}]
            await self.call("chat", {"model": name, "messages": messages, "max_tokens": 1})
        self._connection.forget(attachment)

    async def unload_model(self, name: str) -> None:
        attachment = await self._connection.get()
        raise UnsupportedError(f"model: {attachment.title} decides how long {name} stays in memory")

    # Services

    async def default_model(self, service: str) -> str:
        wanted = KIND_OF_SERVICE.get(service, "")
        known = _first_of_kind((await self._connection.get()).info.models, wanted)
        return known or _first_of_kind((await self._connection.get(fresh=True)).info.models, wanted)

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        if service in ("speech-to-text", "text-to-speech"):
            async with self._using(service, request["model"]) as exchange:
                if service == "speech-to-text":
                    original = not exchange.attachment.server.reads_wav_only
                    return await self._speech.transcribe(exchange, request["model"], request, original=original)
                voice = request.get("voice") or self._options.voice
                return await self._speech.speak(exchange, request["model"], {**request, "voice": voice or None})
        async with self._exchange(service, request, stream=False) as (response, exchange):
            answer = await exchange.whole(response, request)
            require_format(answer, request.get("output_format"), exchange.attachment.title)
        if service == "rerank":
            return ranked_answer(answer, request, raw=exchange.attachment.server.raw_scores)
        return answer

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        if service not in STREAMED:
            raise catalogue.STREAM_UNSUPPORTED.error(service=service, engine="an OpenAI-compatible server")
        async with self._exchange(service, request, stream=True) as (response, exchange):
            yield exchange.streamed(response, request)

    @asynccontextmanager
    async def converse(
        self, service: str, messages: AsyncIterator[ConversationMessage], default_model: str
    ) -> AsyncIterator[AsyncIterator[ConversationMessage]]:
        if service != "speech-to-text-ws":
            raise not_bidirectional(service)

        @asynccontextmanager
        async def use(name: str) -> AsyncIterator[tuple[Exchange, str]]:
            yield Exchange(self._connection, exchange.attachment, service, name), name

        async with (
            self._using(service, default_model) as exchange,
            self._speech.converse(use, default_model, messages) as answers,
        ):
            yield answers

    @asynccontextmanager
    async def _exchange(
        self, service: str, request: dict[str, Any], *, stream: bool
    ) -> AsyncIterator[tuple[PeekedResponse, Exchange]]:
        """Send the request and yield the beginning of the answer."""
        async with self._using(service, request["model"]) as exchange:
            server, found = exchange.attachment.server, exchange.attachment.model(request["model"])
            features = found.capabilities.features if found is not None else ()
            body = requests.request_body(service, request, features)
            streams = server.prepare(service, body, stream=stream or self._assembles(service, server))
            sent = requests.json_body(body, stream=streams, whole=not stream)
            async with exchange.post_json(PATHS[service], sent) as response:
                yield await PeekedResponse.peek(response, streams=streams), exchange

    def _assembles(self, service: str, server: ServerAdapter) -> bool:
        """Whether a whole answer is requested as a stream, so that a cancel reaches the server."""
        wanted = self._options.assemble
        return service in STREAMED and (wanted == "always" or (wanted == "auto" and not server.detects_disconnect))

    @asynccontextmanager
    async def _using(self, service: str, model: str) -> AsyncIterator[Exchange]:
        """An exchange with the server. Raises UnsupportedError if it is known not to have the service."""
        attachment = await self._connection.get()
        if not attachment.has(service):
            raise no_service(attachment, service)
        try:
            async with self._admission.slots(1):
                yield Exchange(self._connection, attachment, service, model)
        except ModelNotFoundError as error:
            raise await self._with_current_models(error) from None
        except BrokenOffError as error:
            raise BadGatewayError(f"{attachment.title} {error.did}. Its log may show why. Try again") from error
        finally:
            self._connection.close_if_replaced(attachment)

    async def _with_current_models(self, error: ModelNotFoundError) -> ModelNotFoundError:
        """The error with the current models; unchanged if they cannot be listed."""
        try:
            return model_missing(await self._connection.get(fresh=True), error.model)
        except EnginePluginError:
            return error


def _first_of_kind(models: Sequence[ModelInfo], kind: str) -> str:
    """The default model of a kind, preferably a loaded one; "" if there is none."""
    fitting = [found for found in models if likely_kind(found) == kind]
    fitting.sort(key=lambda found: found.loaded is None)
    if not fitting and len(models) == 1 and not models[0].kind:
        fitting = list(models)  # its name does not show its kind
    return fitting[0].name if fitting else ""


def _host_problems(manifest: Manifest) -> Sequence[Problem]:
    """The problem of provider.engine_host, the address of the server."""
    host = manifest.provider.engine_host
    try:
        if host:
            BaseUrl.parse(host)
    except ValueError as error:
        what = f"provider.engine_host is {host[:80]!r}: {error}"
        fix = "Give a base URL such as http://127.0.0.1:8000/v1"
        return [manifest.problem(("provider", "engine_host"), what, fix)]
    return []
