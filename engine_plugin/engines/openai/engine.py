"""The engine for servers that speak OpenAI's REST: it finds one, and talks to it. The server is somebody else's."""

from __future__ import annotations

import json
import os
import time
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin import catalogue
from engine_plugin.download.events import Status, Success
from engine_plugin.engines.admission import Admission
from engine_plugin.engines.audio.decoder import Decoder
from engine_plugin.engines.audio.speech import Dialect, Speech
from engine_plugin.engines.base import Engine, EngineCheck, EngineConfig, Health, HealthState, not_bidirectional
from engine_plugin.engines.http.answers import ERROR_LIMIT, stream_events
from engine_plugin.engines.http.assemble import assembled
from engine_plugin.engines.http.bodies import answer_object
from engine_plugin.engines.http.ranking import ranked_answer
from engine_plugin.engines.openai import requests
from engine_plugin.engines.openai.address import BaseUrl
from engine_plugin.engines.openai.begun import Begun
from engine_plugin.engines.openai.client import ApiClient
from engine_plugin.engines.openai.discovery import Finder
from engine_plugin.engines.openai.errors import (
    complaint_of_body,
    is_about_model,
    is_about_path,
    other_error,
)
from engine_plugin.engines.openai.options import OpenAIOptions
from engine_plugin.engines.openai.requests import PATHS, STREAMED
from engine_plugin.engines.openai.servers.base import kind_by_name
from engine_plugin.engines.openai.servers.ovo import pulled
from engine_plugin.engines.openai.voices import AudioClient
from engine_plugin.engines.options import option_problems, read_options
from engine_plugin.engines.shared import SharedWork
from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    ManifestError,
    ModelNotFoundError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.files import in_thread
from engine_plugin.models.capabilities import resolve
from engine_plugin.models.info import KIND_OF_SERVICE, ModelDetails, ModelInfo
from engine_plugin.models.names import near_names

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

    from engine_plugin.download.events import PullEvent
    from engine_plugin.engines.base import BidiMessage, Progress
    from engine_plugin.engines.http.answers import Complaint
    from engine_plugin.engines.http.http1 import HttpResponse
    from engine_plugin.engines.openai.discovery import Attachment
    from engine_plugin.engines.openai.servers.base import Found, Server
    from engine_plugin.errors import Problem
    from engine_plugin.manifest import Manifest
    from engine_plugin.models.store import PullRequest

__all__ = ["OpenAIEngine"]

_ANSWER_LIMIT = 512 * 1024 * 1024
_PARSED = 256 * 1024  # longer ones are not read by us: that would hold up all others
_STALE = 300.0
_LATEST = 253_402_300_799  # the last second that a datetime has
_PATHS = {"transcribe": "/audio/transcriptions", "translate": "/audio/translations", "speak": "/audio/speech"}
_ERRORS = (b'{"error"', b'{ "error"')


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
        environ = dict(os.environ)
        self._finder = Finder(options, manifest.provider.engine_host, environ)
        self._decoder = Decoder(None, environ, options.audio)
        self._admission = Admission(options.parallel, options.max_queue)
        self._finding: SharedWork[Attachment] = SharedWork("looking for the server")
        self._listing: SharedWork[Attachment] = SharedWork("asking the server for its models")
        self._attachment: Attachment | None = None
        self._let_go = False
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
            attachment = await self._attached(for_call=False)
        except EnginePluginError as error:
            return EngineCheck(installed=True, detail=f"nothing is to be installed, but {error}")
        return EngineCheck(installed=True, detail=f"attached to {attachment.title}")

    async def install(self, progress: Progress, *, cover: bool) -> str:  # noqa: ARG002  # nothing is installed
        raise self._not_ours("nor installs")

    async def upgrade(self, progress: Progress) -> str:  # noqa: ARG002
        raise self._not_ours("nor upgrades")

    def _not_ours(self, does: str) -> UnsupportedError:
        where = self._attachment.title if self._attachment is not None else self._where()
        return UnsupportedError(
            f"this engine neither starts {does} a server: {where} belongs to whoever runs it. Start, stop and "
            "upgrade it with its own commands"
        )

    async def init_env(self) -> None:
        await in_thread(_make_folder, self.manifest.data_dir)

    async def version(self) -> str:
        attachment = await self._attached(for_call=False)
        return attachment.seen.version or f"unknown ({attachment.title})"

    def config(self) -> EngineConfig:
        base = self._attachment.base if self._attachment is not None else self._finder.named
        if base is None:
            return EngineConfig(host="127.0.0.1", scheme="http")
        return EngineConfig(host=f"{base.host}:{base.port}", origin=base.root, scheme=base.scheme)

    # Life

    async def start(self, mode: str) -> None:  # noqa: ARG002  # the server decides where it computes
        await self.init_env()
        self._let_go = False
        await self._look()

    async def stop(self) -> None:
        self._let_go = True
        await self._finding.cancel()
        await self._listing.cancel()
        self._forget()

    async def health(self) -> Health:
        if self._let_go:
            return Health(HealthState.DEAD, str(catalogue.ENGINE_STOPPED.error()))
        try:
            attachment = await self._attached()
            await self._finder.require_alive(attachment)
        except EnginePluginError as error:
            self._forget()
            return Health(HealthState.DEAD, str(error))
        return Health(HealthState.READY, f"{attachment.title} serves {len(attachment.seen.models)} models")

    async def _attached(self, *, for_call: bool = True) -> Attachment:
        """The server, looked at not too long ago. `for_call`: not after a stop."""
        if for_call and self._let_go:
            raise catalogue.ENGINE_STOPPED.error()
        found = self._attachment
        if found is not None and time.monotonic() - found.at < _STALE:
            return found
        return await self._look()

    async def _listed(self, *, for_call: bool = True) -> Attachment:
        """The server with the models that it has now: it may load and lose some at any time."""
        if for_call and self._let_go:
            raise catalogue.ENGINE_STOPPED.error()
        return await self._listing.run(self._list)

    async def _list(self) -> Attachment:
        known = self._attachment
        if known is None or time.monotonic() - known.at >= _STALE:
            return await self._look()
        try:
            same = await self._finder.list_again(known)
        except EnginePluginError:
            self._forget(known)
            raise
        return known if same else await self._look()

    async def _look(self) -> Attachment:
        return await self._finding.run(self._find)

    async def _find(self) -> Attachment:
        before = self._attachment
        try:
            found = await (self._finder.find() if before is None else self._finder.look_again(before))
        except EnginePluginError:
            self._forget()
            raise
        if self._let_go:
            found.http.close()  # asked for by who only wants to know; nothing is kept
            return found
        self._attachment = found
        if before is not None:
            before.http.close()
        return found

    def _forget(self, only: Attachment | None = None) -> None:
        """Look for a server anew; `only`: unless another has been found already."""
        before = self._attachment
        if before is not None and only in (None, before):
            self._attachment = None
            before.http.close()

    def _where(self) -> str:
        return self._finder.named.url if self._finder.named is not None else "a server on this machine"

    # Models

    async def list_models(self) -> Sequence[ModelInfo]:
        attachment = await self._listed(for_call=False)
        return [self._info(found) for found in attachment.seen.models]

    async def running_models(self) -> Sequence[ModelInfo]:
        return [model for model in await self.list_models() if model.loaded is not None]

    def _info(self, found: Found) -> ModelInfo:
        kind = found.kind or kind_by_name(found.name)
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
            kind=kind,
            engine=found.engine,
            overrides=self._options.models,
        )
        made = datetime.fromtimestamp(min(found.created, _LATEST), UTC)
        return ModelInfo(
            found.name,
            kind,
            found.size,
            "",
            made,
            bundled=False,
            details=details,
            capabilities=capabilities,
            loaded=found.loaded,
        )

    async def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        attachment = await self._listed()
        name = request.model
        here = next((found for found in attachment.seen.models if found.name == name), None)
        if here is not None and not request.source:
            yield Status(f"{attachment.title} has {name}")
            yield Success(name, here.size, "")
            return
        if attachment.server.name != "ovo":
            raise UnsupportedError(
                f"model: {attachment.title} has its own models, and nothing can be pulled to it from here. Add "
                f"{name} with the server's own commands; engine-plugin models list shows what there is"
            )
        http = self._finder.client(attachment, attachment.base.port + 1)
        errors = _Errors(self, attachment, "", name)

        async def native(method: str, path: str, body: bytes | None = None) -> Any:
            async with http.request(method, path, body) as response:
                data = await response.read(ERROR_LIMIT)
            if response.status not in (200, 201, 202):
                raise errors.of(complaint_of_body(response.status, data))
            return answer_object(data)

        body = json.dumps({"repo_id": request.source or name}).encode()
        try:
            async with aclosing(pulled(native, name, body)) as events:
                async for event in events:
                    yield event
        finally:
            http.close()
            self._forget(attachment)  # its list of models has changed

    async def delete_model(self, name: str) -> None:
        attachment = await self._attached()
        raise UnsupportedError(
            f"model: {name} belongs to {attachment.title}; delete it with the server's own commands"
        )

    async def load_model(self, name: str) -> None:
        """Servers load their models themselves, at their start or when a request comes: then one is sent."""
        attachment = await self._listed()
        found = next((found for found in attachment.seen.models if found.name == name), None)
        if found is None:
            raise _missing(attachment, name)
        if found.loaded is not None or attachment.server.name != "lmstudio":
            return
        if self._info(found).kind == "embed":
            await self.call("embed", {"model": name, "input": "a"})
        else:
            messages = [{"role": "user", "content": "a"}]
            await self.call("chat", {"model": name, "messages": messages, "max_tokens": 1})
        self._forget(attachment)

    async def unload_model(self, name: str) -> None:
        attachment = await self._attached()
        raise UnsupportedError(f"model: {attachment.title} decides itself how long {name} stays in memory")

    # Services

    async def default_model(self, service: str) -> str:
        wanted = KIND_OF_SERVICE.get(service, "")
        known = _first_of_kind((await self._attached()).seen.models, wanted)
        return known or _first_of_kind((await self._listed()).seen.models, wanted)

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        if service in ("speech-to-text", "text-to-speech"):
            async with self._speech_for(service, request["model"]) as speech:
                if service == "speech-to-text":
                    return await speech.transcribe(request["model"], request)
                voice = request.get("voice") or self._options.voice
                return await speech.speak(request["model"], {**request, "voice": voice or None})
        async with self._exchange(service, request, stream=False) as (begun, use):
            answer = await _whole(service, begun, use, request)
        if service == "rerank":
            return ranked_answer(answer, request, raw=use.attachment.server.raw_scores)
        return answer

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        if service not in STREAMED:
            raise catalogue.NO_STREAM.error(service=service, engine="an OpenAI-compatible server")
        async with self._exchange(service, request, stream=True) as (begun, use):
            yield _told_at_once(begun, use, request) if begun.is_whole else use.events(begun)

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
    async def _speech_for(self, service: str, model: str) -> AsyncIterator[Speech]:
        async with self._using(service, model) as use:
            server = use.attachment.server
            client = AudioClient(use.client(), server.form_fields, self._plain_models)
            dialect = Dialect(_PATHS, original=not server.reads_wav_only)
            yield Speech(
                lambda: client, dialect, self._decoder, self.manifest.data_dir / "output", self._options.live
            )

    @asynccontextmanager
    async def _exchange(
        self, service: str, request: dict[str, Any], *, stream: bool
    ) -> AsyncIterator[tuple[Begun, _Errors]]:
        """From the request to the beginning of the server's answer."""
        async with self._using(service, request["model"]) as use:
            server, body = use.attachment.server, requests.request_body(service, request)
            streams = server.adapt(service, body, stream=stream or self._assembles(service, server))
            sent = requests.json_body(body, stream=streams, whole=not stream)
            async with use.client().post_json(PATHS[service], sent) as response:
                yield await Begun.of(response, streams=streams), use

    def _assembles(self, service: str, server: Server) -> bool:
        """Whether the server must be asked for a stream where a whole answer is wanted."""
        wanted = self._options.assemble
        return service in STREAMED and (wanted == "always" or (wanted == "auto" and not server.hears_leaving))

    @asynccontextmanager
    async def _using(self, service: str, model: str) -> AsyncIterator[_Errors]:
        """A turn at the server, which has the service as far as is known."""
        attachment = await self._attached()
        if service not in attachment.able([service]):
            raise self._no_service(attachment, service)
        try:
            async with self._admission.slots(1):
                yield _Errors(self, attachment, service, model)
        except ModelNotFoundError as error:
            raise await self._missing_now(model, error) from None
        finally:
            if self._attachment is not attachment:
                attachment.http.close()  # nobody else will

    async def _missing_now(self, model: str, before: ModelNotFoundError) -> ModelNotFoundError:
        """Told with the models that there are now; with those known `before` if the server says nothing more."""
        try:
            return _missing(await self._listed(), model)
        except EnginePluginError:
            return before

    def _no_service(self, attachment: Attachment, service: str) -> UnsupportedError:
        able = ", ".join(attachment.able(sorted(self.services))) or "nothing that is known"
        return catalogue.NO_SERVICE.error(engine=attachment.title, service=service, able=able)


class _Errors:
    """What goes wrong with one request to one server."""

    def __init__(self, engine: OpenAIEngine, attachment: Attachment, service: str, model: str) -> None:
        self._engine = engine
        self.attachment = attachment
        self._service = service
        self._model = model

    def client(self) -> ApiClient:
        """Who sends it."""
        return ApiClient(self.attachment.http, self.attachment.base.path, self)

    def down(self, reason: UnavailableError) -> EnginePluginError:
        """The server cannot be reached: the next call looks for it anew."""
        self._engine._forget(self.attachment)
        return self.attachment.down(reason)

    def of(self, complaint: Complaint) -> EnginePluginError:
        """The server's answer is no good one, or its stream had an error."""
        if complaint.status in (401, 403):
            return self._engine._finder.key_error(self.attachment, complaint.message)
        if is_about_model(complaint, self._model):
            return _missing(self.attachment, self._model)
        if self._service and is_about_path(complaint):
            if complaint.status == 501:  # for want of a switch, perhaps, which its words name
                return UnsupportedError(f"service_name: {self.attachment.title} says: {complaint.message}")
            self.attachment.lacks.add(self._service)
            return self._engine._no_service(self.attachment, self._service)
        return other_error(complaint)

    def events(self, response: HttpResponse) -> AsyncGenerator[bytes, None]:
        """The events of its stream, up to `[DONE]`."""
        return stream_events(response, self.of, self.attachment.server.noise, longest=_ANSWER_LIMIT)

    def require_answer(self, answer: bytes) -> None:
        """Raise for an error that came with the status of a good answer, as LM Studio sends it, and for no object."""
        short = len(answer) <= _PARSED
        wrong = bool(answer_object(answer).get("error")) if short else answer.startswith(_ERRORS)
        if wrong:
            raise self.of(complaint_of_body(200, answer))
        if not (answer.lstrip()[:1] == b"{" and answer.rstrip()[-1:] == b"}"):
            raise BadGatewayError(f"the server's answer is no JSON object: {answer[:200]!r}")


def _first_of_kind(models: Sequence[Found], kind: str) -> str:
    """The model for a call that names none: one in memory, if there is one; "" for none."""
    fitting = [found for found in models if (found.kind or kind_by_name(found.name)) == kind]
    fitting.sort(key=lambda found: found.loaded is None)
    if not fitting and len(models) == 1 and not models[0].kind:
        fitting = list(models)  # its name says nothing of what it is for
    return fitting[0].name if fitting else ""


def _missing(attachment: Attachment, name: str) -> ModelNotFoundError:
    names = [found.name for found in attachment.seen.models]
    pull = name if attachment.server.name == "ovo" and "/" in name else ""
    return catalogue.model_missing(
        name,
        near=near_names(name, names),
        here=names,
        pull=pull,
    )


async def _whole(service: str, begun: Begun, use: _Errors, request: Mapping[str, Any]) -> bytes:
    """The answer that the server gives at once, or in the pieces of a stream."""
    if begun.is_whole:
        answer = await begun.read(_ANSWER_LIMIT)
        use.require_answer(answer)
        return answer
    told, size = [], 0
    async with aclosing(use.events(begun)) as blocks:
        async for block in blocks:
            told.append(block)
            size += len(block)
            if size > _ANSWER_LIMIT:
                raise BadGatewayError(f"the server's answer is longer than {_ANSWER_LIMIT} bytes")
    return assembled(service, told, request)


async def _told_at_once(response: HttpResponse, use: _Errors, request: Mapping[str, Any]) -> AsyncIterator[bytes]:
    """A stream of what a server says that cannot stream it."""
    answer = await response.read(_ANSWER_LIMIT)
    use.require_answer(answer)
    options = request.get("stream_options")
    yield requests.as_stream(answer, usage=isinstance(options, dict) and bool(options.get("include_usage")))


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


def _make_folder(folder: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
