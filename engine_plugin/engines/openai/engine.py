"""The engine for servers that speak OpenAI's REST: it finds one, and talks to it. The server is somebody else's."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin import catalogue
from engine_plugin.download.events import Status, Success
from engine_plugin.engines.base import Engine, Health, HealthState, not_bidirectional
from engine_plugin.engines.local.admission import Admission
from engine_plugin.engines.openai import requests
from engine_plugin.engines.openai.address import BaseUrl
from engine_plugin.engines.openai.connection import HeldServer
from engine_plugin.engines.openai.discovery import Finder
from engine_plugin.engines.openai.errors import complaint_of_body
from engine_plugin.engines.openai.exchange import Turn, model_missing, no_service
from engine_plugin.engines.openai.options import OpenAIOptions
from engine_plugin.engines.openai.peeked import Begun
from engine_plugin.engines.openai.requests import PATHS, STREAMED
from engine_plugin.engines.openai.servers.ovo import pulled
from engine_plugin.engines.openai.voices import AudioClient
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
from engine_plugin.models.info import KIND_OF_SERVICE, ModelDetails, ModelInfo
from engine_plugin.openai_api.pictures import require_format
from engine_plugin.openai_api.ranking import ranked_answer
from engine_plugin.process.environ import child_environ
from engine_plugin.protocol.shapes import EngineCheck, EngineConfig
from engine_plugin.speech.decoder import Decoder
from engine_plugin.speech.services import Dialect, SpeechServices
from engine_plugin.system.files import in_thread, private_data_dir
from engine_plugin.transport.answers import ERROR_LIMIT
from engine_plugin.transport.http1 import BrokenOffError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from engine_plugin.download.events import PullEvent
    from engine_plugin.engines.base import Progress
    from engine_plugin.engines.openai.servers.base import Found, Server
    from engine_plugin.errors import Problem
    from engine_plugin.manifest import Manifest
    from engine_plugin.messages import BidiMessage
    from engine_plugin.models.store import PullRequest

__all__ = ["OpenAIEngine"]

_PATIENCE = 60.0  # for an answer that takes no computing
_LATEST = 253_402_300_799  # the last second that a datetime has
_SPEECH_PATHS = {
    "transcribe": PATHS["speech-to-text"],
    "translate": "/audio/translations",
    "speak": PATHS["text-to-speech"],
}


class OpenAIEngine(Engine):
    """`Engine` on a server that is attached to when it is first needed, and looked for again when it has gone.

    StartEngine looks for it at once; StopEngine lets go of it until the next StartEngine.
    """

    services: ClassVar[frozenset[str]] = frozenset(KIND_OF_SERVICE)

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self._options = options = read_options(OpenAIOptions, manifest)
        if problem := _host_problem(manifest):
            raise ManifestError([problem])
        environ = child_environ(os.environ)
        self._finder = Finder(options, manifest.provider.engine_host, environ)
        self._decoder = Decoder(None, environ, options.audio)
        self._admission = Admission(options.parallel, options.max_queue)
        self._held = HeldServer(self._finder)
        self._plain_models: set[str] = set()

    @staticmethod
    def check_options(manifest: Manifest) -> Sequence[Problem]:
        """What is wrong with the `engine:` section, and with engine_host. Called by `engine-plugin lint`."""
        problem = _host_problem(manifest)
        return [*option_problems(OpenAIOptions, manifest), *([problem] if problem else [])]

    # Software

    async def check(self) -> EngineCheck:
        """There is nothing to install: whether a server answers is for `start` and `health` to say."""
        try:
            attachment = await self._held.get(for_call=False)
        except EnginePluginError as error:
            return EngineCheck(installed=True, detail=f"nothing is to be installed, but {error}")
        return EngineCheck(installed=True, detail=f"attached to {attachment.title}")

    async def install(self, progress: Progress, *, cover: bool) -> str:  # noqa: ARG002  # nothing is installed
        raise self._not_ours("nor installs")

    async def upgrade(self, progress: Progress) -> str:  # noqa: ARG002
        raise self._not_ours("nor upgrades")

    def _not_ours(self, does: str) -> UnsupportedError:
        return UnsupportedError(
            f"this engine neither starts {does} a server: {self._held.where} belongs to whoever runs it. Start, stop "
            "and upgrade it with its own commands"
        )

    async def init_env(self) -> None:
        await in_thread(private_data_dir, self.manifest.data_dir)

    async def version(self) -> str:
        attachment = await self._held.get(for_call=False)
        return attachment.seen.version or f"unknown ({attachment.title})"

    def config(self) -> EngineConfig:
        attachment = self._held.attachment
        base = self._finder.named if attachment is None else attachment.base
        if base is None:
            return EngineConfig()
        return EngineConfig(host=base.authority, origin=base.root, scheme=base.scheme)

    # Life

    async def start(self, mode: str) -> None:  # noqa: ARG002  # the server decides where it computes
        await self.init_env()
        await self._held.look_anew()

    async def stop(self) -> None:
        await self._held.release()

    async def health(self) -> Health:
        if self._held.let_go:
            return Health.dead(catalogue.ENGINE_NOT_RUNNING.error())
        try:
            attachment = await self._held.get()
            await self._finder.require_alive(attachment)
        except EnginePluginError as error:
            self._held.forget()
            return Health.dead(error)
        return Health(HealthState.READY, f"{attachment.title} serves {len(attachment.seen.models)} models")

    # Models

    async def list_models(self) -> Sequence[ModelInfo]:
        attachment = await self._held.listed(for_call=False)
        return [self._info(found) for found in attachment.seen.models]

    async def running_models(self) -> Sequence[ModelInfo]:
        return [model for model in await self.list_models() if model.loaded is not None]

    def _info(self, found: Found) -> ModelInfo:
        details = ModelDetails(
            found.format,
            found.family,
            (found.family,) if found.family else (),
            found.parameter_size,
            found.quantization,
            found.extra,
        )
        capabilities = resolve(
            found.name,
            found.family,
            found.parameter_size,
            kind=found.likely_kind,
            engine=found.engine,
            overrides=self._options.models,
        )
        made = datetime.fromtimestamp(min(found.created, _LATEST), UTC)
        return ModelInfo(
            found.name,
            found.likely_kind,
            found.size,
            "",
            made,
            bundled=False,
            details=details,
            capabilities=capabilities,
            loaded=found.loaded,
        )

    async def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        attachment = await self._held.listed()
        name = request.model
        here = attachment.model(name)
        if here is not None and not request.source:
            yield Status(f"{attachment.title} has {name}")
            yield Success(name, here.size, "")
            return
        if not attachment.server.pulls:
            raise UnsupportedError(
                f"model: {attachment.title} has its own models, and nothing can be pulled to it from here. Add "
                f"{name} with the server's own commands; ListModels shows what there is"
            )
        http = self._finder.client(attachment, attachment.base.port + 1)
        turn = Turn(self._held, self._finder, attachment, "", name)

        async def native(method: str, path: str, body: bytes | None = None) -> Any:
            try:
                async with asyncio.timeout(_PATIENCE), http.request(method, path, body) as response:
                    data = await response.read(ERROR_LIMIT)
            except TimeoutError:
                raise PullError(f"model: {attachment.title} did not answer {path} in {_PATIENCE:g} s") from None
            if response.status not in (200, 201, 202):
                raise turn.of(complaint_of_body(response.status, data))
            return answer_object(data)

        body = json.dumps({"repo_id": request.source or name}).encode()
        try:
            async with aclosing(pulled(native, name, body)) as events:
                async for event in events:
                    yield event
        finally:
            http.close()
            self._held.forget(attachment)  # its list of models has changed

    async def delete_model(self, name: str) -> None:
        attachment = await self._held.get()
        raise UnsupportedError(
            f"model: {name} belongs to {attachment.title}; delete it with the server's own commands"
        )

    async def load_model(self, name: str) -> None:
        """Servers load their models themselves, at their start or when a request comes: then one is sent."""
        attachment = await self._held.listed()
        found = attachment.model(name)
        if found is None:
            raise model_missing(attachment, name)
        if found.loaded is not None or not attachment.server.loads_when_asked:
            return
        if found.likely_kind == "embed":
            await self.call("embed", {"model": name, "input": "a"})
        else:
            messages = [{"role": "user", "content": "a"}]
            await self.call("chat", {"model": name, "messages": messages, "max_tokens": 1})
        self._held.forget(attachment)

    async def unload_model(self, name: str) -> None:
        attachment = await self._held.get()
        raise UnsupportedError(f"model: {attachment.title} decides itself how long {name} stays in memory")

    # Services

    async def default_model(self, service: str) -> str:
        wanted = KIND_OF_SERVICE.get(service, "")
        known = _first_of_kind((await self._held.get()).seen.models, wanted)
        return known or _first_of_kind((await self._held.listed()).seen.models, wanted)

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        if service in ("speech-to-text", "text-to-speech"):
            async with self._speech_for(service, request["model"]) as speech:
                if service == "speech-to-text":
                    return await speech.transcribe(request["model"], request)
                voice = request.get("voice") or self._options.voice
                return await speech.speak(request["model"], {**request, "voice": voice or None})
        async with self._exchange(service, request, stream=False) as (begun, turn):
            answer = await turn.whole(begun, request)
            require_format(answer, request.get("output_format"), turn.attachment.title)
        if service == "rerank":
            return ranked_answer(answer, request, raw=turn.attachment.server.raw_scores)
        return answer

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        if service not in STREAMED:
            raise catalogue.STREAM_UNSUPPORTED.error(service=service, engine="an OpenAI-compatible server")
        async with self._exchange(service, request, stream=True) as (begun, turn):
            yield turn.streamed(begun, request)

    @asynccontextmanager
    async def converse(
        self, service: str, messages: AsyncIterator[BidiMessage], default_model: str
    ) -> AsyncIterator[AsyncIterator[BidiMessage]]:
        if service != "speech-to-text-ws":
            raise not_bidirectional(service)

        @asynccontextmanager
        async def use(name: str) -> AsyncIterator[str]:
            yield name

        async with (
            self._speech_for(service, default_model) as speech,
            speech.converse(use, default_model, messages) as answers,
        ):
            yield answers

    @asynccontextmanager
    async def _speech_for(self, service: str, model: str) -> AsyncIterator[SpeechServices]:
        async with self._using(service, model) as turn:
            server = turn.attachment.server
            client = AudioClient(turn.client(), server.form_fields, self._plain_models)
            dialect = Dialect(_SPEECH_PATHS, original=not server.reads_wav_only)
            yield SpeechServices(
                lambda: client, dialect, self._decoder, self.manifest.data_dir / "output", self._options.live
            )

    @asynccontextmanager
    async def _exchange(
        self, service: str, request: dict[str, Any], *, stream: bool
    ) -> AsyncIterator[tuple[Begun, Turn]]:
        """From the request to the beginning of the server's answer."""
        async with self._using(service, request["model"]) as turn:
            server, found = turn.attachment.server, turn.attachment.model(request["model"])
            told = found.engine if found is not None else None
            body = requests.request_body(service, request, told.features if told is not None else ())
            requests.generation(service, body, server)
            streams = server.adapt(service, body, stream=stream or self._assembles(service, server))
            sent = requests.json_body(body, stream=streams, whole=not stream)
            async with turn.client().post_json(PATHS[service], sent) as response:
                yield await Begun.of(response, streams=streams), turn

    def _assembles(self, service: str, server: Server) -> bool:
        """Whether the server must be asked for a stream where a whole answer is wanted."""
        wanted = self._options.assemble
        return service in STREAMED and (wanted == "always" or (wanted == "auto" and not server.hears_leaving))

    @asynccontextmanager
    async def _using(self, service: str, model: str) -> AsyncIterator[Turn]:
        """A turn at the server, which has the service as far as is known."""
        attachment = await self._held.get()
        if service not in attachment.able([service]):
            raise no_service(attachment, service)
        try:
            async with self._admission.slots(1):
                yield Turn(self._held, self._finder, attachment, service, model)
        except ModelNotFoundError as error:
            raise await self._missing_now(model, error) from None
        except BrokenOffError as error:
            raise BadGatewayError(f"{attachment.title} {error.did}. Its own log may say why; try again") from error
        finally:
            self._held.close_if_lost(attachment)

    async def _missing_now(self, model: str, before: ModelNotFoundError) -> ModelNotFoundError:
        """Told with the models that there are now; with those known `before` if the server says nothing more."""
        try:
            return model_missing(await self._held.listed(), model)
        except EnginePluginError:
            return before


def _first_of_kind(models: Sequence[Found], kind: str) -> str:
    """The model for a call that names none: one in memory, if there is one; "" for none."""
    fitting = [found for found in models if found.likely_kind == kind]
    fitting.sort(key=lambda found: found.loaded is None)
    if not fitting and len(models) == 1 and not models[0].kind:
        fitting = list(models)  # its name says nothing of what it is for
    return fitting[0].name if fitting else ""


def _host_problem(manifest: Manifest) -> Problem | None:
    """What is wrong with provider.engine_host, which is where this engine finds its server."""
    host = manifest.provider.engine_host
    try:
        if host:
            BaseUrl.parse(host)
    except ValueError as error:
        what = f"provider.engine_host is {host[:80]!r}: {error}"
        return manifest.problem(("provider", "engine_host"), what, "Give a base URL such as http://127.0.0.1:8000/v1")
    return None
