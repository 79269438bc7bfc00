"""The middle of the house: a manifest, an engine, services and deadlines. No gRPC and no HTTP here.

`server.servicer` calls it for a host; the CLI and tests reach it the same way.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue, deadlines
from engine_plugin.deadlines import deadline
from engine_plugin.download.sizes import byte_size
from engine_plugin.download.source import without_secrets
from engine_plugin.engines.base import HealthState
from engine_plugin.errors import (
    EnginePluginError,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
    UnsupportedError,
    error_about,
)
from engine_plugin.jsontext import BRIEF
from engine_plugin.models.available import Offer, names_for
from engine_plugin.models.defaults import DefaultModels
from engine_plugin.models.missing import MissingModels
from engine_plugin.services import CONVERSATIONS
from engine_plugin.system.files import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence

    from engine_plugin.download.events import ChunkProgress, PullEvent
    from engine_plugin.engines.base import BidiMessage, Engine, EngineCheck, EngineConfig, Health, Progress
    from engine_plugin.manifest import Manifest, ServiceSpec
    from engine_plugin.models.store import ModelInfo, PullRequest
    from engine_plugin.services import Service

__all__ = ["MODES", "OperateStatus", "Plugin"]

log = logging.getLogger(__name__)

MODES = {"": "auto", "auto": "auto", "daemon": "auto", "standard": "auto", "cpu": "cpu", "gpu": "gpu", "npu": "npu"}
"""StartEngine's modes as hosts send them, and what they mean to an engine."""

_LINE_S = 0.5
_LINE_BYTES = 16 * 1024 * 1024
"""How often a download is told of in the log: at most so often, and, of an unknown size, every so many bytes."""

_MOST_HEARD = 64
"""Messages of a conversation that are kept until its first answer, in case that its model must be pulled first."""

_RAISE = "Raise services[].timeout in plugin.yaml, or make it negative for no deadline"


class OperateStatus(IntEnum):
    """GetOperateStatus: whether the engine is meant to run. STOPPED keeps a host from reviving it."""

    STOPPED = 0
    RUNNING = 1
    ERROR = 2


class Plugin:
    """One plugin: answers what its manifest declares, with its engine. Used from one event loop."""

    def __init__(self, manifest: Manifest, engine: Engine) -> None:
        self.manifest = manifest
        self.engine = engine
        # A host's keep-alive passes over a plugin that says STOPPED, so a fresh one says RUNNING: revive me.
        self._status = OperateStatus.RUNNING
        self._defaults = DefaultModels(manifest.data_dir, manifest.engine_name)
        self._offer = Offer(engine.list_models)
        self._missing = MissingModels(engine.pull_model, lambda: _progress_log("PullModel"))

    async def aclose(self) -> None:
        """Stop the engine for good."""
        await self._offer.aclose()
        await self.engine.aclose()

    async def manifest_json(self) -> bytes:
        """plugin.yaml as GetManifest answers it, with the default models that count now.

        Where plugin.yaml names no models of a service, those that can serve it are named.
        """
        services = self.manifest.services.values()
        defaults = {service.service_name: await self._configured_model(service) for service in services}
        models = () if all(service.support_models for service in services) else await self._offer.models()
        return self.manifest.to_json(
            {name: names_for(name, default, models) for name, default in defaults.items()}, defaults
        )

    # Services

    async def invoke(self, service_name: str, data: bytes) -> bytes:
        """Answer one request with a JSON object. Raises DeadlineError when plugin.yaml's timeout has passed.

        With `auto_pull` in plugin.yaml a model that is missing is pulled first, which no timeout counts.
        """
        with error_about(service=service_name):
            try:
                return await self._invoke(service_name, data)
            except ModelNotFoundError as error:
                await self._fetch_missing(error)
            return await self._invoke(service_name, data)

    async def _invoke(self, service_name: str, data: bytes) -> bytes:
        service, contract, request, default = await self._prepare(service_name, data)
        trivial = contract.trivial_answer(request)
        if trivial is not None:
            return json.dumps(trivial).encode()
        with self._naming_default(service, default):
            async with deadline(deadlines.allowed(service, "unary"), service_name, _RAISE):
                return await self.engine.call(service_name, request)

    @asynccontextmanager
    async def stream(self, service_name: str, data: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """Answer one request in chunks of whole events. The deadline counts from here to the end of the block;
        leaving the block stops the engine's work. A model that is missing is pulled as for `invoke`."""
        async with AsyncExitStack() as stack:
            stack.enter_context(error_about(service=service_name))
            try:
                chunks = await stack.enter_async_context(self._stream(service_name, data))
            except ModelNotFoundError as error:
                await self._fetch_missing(error)
                chunks = await stack.enter_async_context(self._stream(service_name, data))
            yield chunks

    @asynccontextmanager
    async def _stream(self, service_name: str, data: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        service, _contract, request, default = await self._prepare(service_name, data)
        if not service.capabilities.support_streaming:
            raise catalogue.STREAM_UNSUPPORTED.error(
                service=service_name, engine="this plugin.yaml (support_streaming)"
            )
        with self._naming_default(service, default):
            async with (
                deadline(deadlines.allowed(service, "stream"), service_name, _RAISE),
                self.engine.stream(service_name, request) as chunks,
            ):
                yield chunks

    @asynccontextmanager
    async def converse(
        self, service_name: str, messages: AsyncIterator[BidiMessage]
    ) -> AsyncIterator[AsyncIterator[BidiMessage]]:
        """Hold a conversation. Without a positive timeout in plugin.yaml it has no deadline.

        A model that is missing is pulled as for `invoke`, before the host hears anything.
        """
        async with aclosing(_checked(service_name, messages)) as checked, AsyncExitStack() as stack:
            stack.enter_context(error_about(service=service_name))
            service = self._declared(service_name)
            if not service.capabilities.support_bidirectional:
                raise UnsupportedError(
                    f"service_name: {service_name} is not bidirectional; call InvokeService or InvokeServiceStream"
                )
            default = await self._default_model(service)
            heard = _Heard(checked)
            if not self.manifest.auto_pull:
                heard.forget()
            answers = await stack.enter_async_context(self._conversation(service, heard, default))
            if self.manifest.auto_pull:
                said, failure = await _opening(service_name, answers)
                if isinstance(failure, ModelNotFoundError) and failure.pull and heard.rewind():
                    await stack.aclose()
                    await self._fetch_missing(failure)
                    answers = await stack.enter_async_context(self._conversation(service, heard, default))
                else:
                    answers = await stack.enter_async_context(aclosing(_going_on(said, failure, answers)))
                heard.forget()
            yield answers

    @asynccontextmanager
    async def _conversation(
        self, service: ServiceSpec, messages: AsyncIterator[BidiMessage], default: str
    ) -> AsyncIterator[AsyncIterator[BidiMessage]]:
        with self._naming_default(service, default):
            async with (
                deadline(deadlines.allowed(service, "bidi"), service.service_name, _RAISE),
                self.engine.converse(service.service_name, messages, default) as answers,
            ):
                yield answers

    async def _fetch_missing(self, error: ModelNotFoundError) -> None:
        """Pull the model that a call missed, if plugin.yaml allows that and a pull would bring it; else raise."""
        if not (self.manifest.auto_pull and error.pull):
            raise error
        await self._missing.fetch(error.pull)

    def _declared(self, service_name: str) -> ServiceSpec:
        if not service_name:
            raise InvalidRequestError.at(
                "service_name", f"is empty; this plugin has {', '.join(self.manifest.services)}"
            )
        service = self.manifest.service(service_name)
        if service_name not in self.engine.services:
            raise catalogue.SERVICE_UNSUPPORTED.error(
                engine=f"the engine {self.manifest.engine_name}",
                service=service_name,
                able=", ".join(sorted(self.engine.services)) or "nothing",
            )
        return service

    async def _configured_model(self, service: ServiceSpec) -> str:
        """The default model that the user, plugin.yaml or the models on this machine give a service, else "".

        A model of the user's own comes before a sample, even one that plugin.yaml names.
        """
        chosen, declared = await self._defaults.of(service.service_name), service.default_model
        if chosen or not declared or not await self.engine.is_sample(declared):
            return chosen or declared
        return await self.engine.default_model(service.service_name) or declared

    async def _default_model(self, service: ServiceSpec) -> str:
        """The model for a call that names none: the configured one, else the engine's choice, else ""."""
        return await self._configured_model(service) or await self.engine.default_model(service.service_name)

    @contextmanager
    def _naming_default(self, service: ServiceSpec, default: str) -> Iterator[None]:
        """Say of a missing model that it is the default one; "" for a call that names its model itself."""
        try:
            yield
        except ModelNotFoundError as error:
            if error.model != default or not default:
                raise
            place = self.manifest.path if default == service.default_model else self._defaults.path
            raise catalogue.default_missing(default, service.service_name, str(place), pull=error.pull) from error

    async def _prepare(self, service_name: str, data: bytes) -> tuple[ServiceSpec, Service, dict[str, Any], str]:
        """Check a request once: the service, its contract, the JSON with a model in it, and that model if the
        request itself named none, else ""."""
        spec = self._declared(service_name)
        contract = self.engine.contract(spec)
        if contract is None:
            raise UnsupportedError(
                f"service_name: {service_name} cannot be called with a JSON request; use InvokeServiceBidi"
            )
        request = contract.read(data) if len(data) <= BRIEF else await in_thread(contract.read, data)
        default = ""
        if not request.get("model"):
            default = request["model"] = await self._default_model(spec)
            if not default:
                raise InvalidRequestError.at(
                    "model", f"is missing, and plugin.yaml has no default_model for {service_name}"
                )
        return spec, contract, request, default

    # The engine's life

    @property
    def status(self) -> OperateStatus:
        """What the host or the last start or stop made of it."""
        return self._status

    def set_status(self, status: int) -> None:
        """Take over the host's view. An unknown number raises InvalidRequestError."""
        try:
            self._status = OperateStatus(status)
        except ValueError:
            known = ", ".join(f"{known.value} {known.name.lower()}" for known in OperateStatus)
            raise InvalidRequestError.at("status", f"{status} is unknown; it must be {known}") from None

    async def start(self, mode: str) -> None:
        """Start the engine; see MODES for the words that are taken."""
        wanted = MODES.get(mode.strip().lower())
        if wanted is None:
            raise InvalidRequestError.at("mode", f"{mode[:40]!r} is unknown; use auto, cpu, gpu or npu")
        try:
            async with deadline(deadlines.START, "StartEngine"):
                await self.engine.start(wanted)
        except InvalidRequestError:
            raise
        except Exception:
            self._status = OperateStatus.ERROR
            raise
        self._status = OperateStatus.RUNNING

    async def stop(self) -> None:
        """Stop the engine, and say STOPPED from now on."""
        self._status = OperateStatus.STOPPED
        async with deadline(deadlines.STOP, "StopEngine"):
            await self.engine.stop()

    async def health(self) -> Health:
        """The engine's health. Raises UnavailableError when it cannot serve."""
        async with deadline(deadlines.HEALTH, "HealthCheck"):
            health = await self.engine.health()
        if health.state is HealthState.DEAD:
            raise _cannot_serve(health)
        return health

    # The engine's software

    async def check(self) -> EngineCheck:
        """Whether the engine's software is here."""
        async with deadline(deadlines.CHECK, "CheckEngine"):
            return await self.engine.check()

    async def install(self, *, cover: bool) -> str:
        """Install the engine's software; returns what is installed."""
        async with deadline(deadlines.INSTALL, "InstallEngine"):
            return await self.engine.install(_progress_log("InstallEngine"), cover=cover)

    async def upgrade(self) -> str:
        """Upgrade the engine's software; returns what is installed."""
        async with deadline(deadlines.INSTALL, "UpgradeEngine"):
            return await self.engine.upgrade(_progress_log("UpgradeEngine"))

    async def init_env(self) -> None:
        """Make ready what a start needs."""
        async with deadline(deadlines.CHECK, "InitEnv"):
            await self.engine.init_env()

    async def version(self) -> str:
        """The engine's version."""
        async with deadline(deadlines.CHECK, "GetVersion"):
            return await self.engine.version()

    def config(self) -> EngineConfig:
        """Where the engine lives."""
        return self.engine.config()

    # Models

    async def list_models(self) -> Sequence[ModelInfo]:
        """The models that a call may name."""
        async with deadline(deadlines.CHECK, "ListModels"):
            return await self.engine.list_models()

    async def running_models(self) -> Sequence[ModelInfo]:
        """The models in memory."""
        return await self.engine.running_models()

    async def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        """Fetch a model; no deadline but the host's, since size and network decide."""
        with error_about(model=without_secrets(request.model)):
            async with aclosing(self.engine.pull_model(request)) as events:
                async for event in events:
                    yield event

    async def delete_model(self, name: str) -> None:
        """Delete a model."""
        with error_about(model=name):
            async with deadline(deadlines.STOP, "DeleteModel"):
                await self.engine.delete_model(name)

    async def load_model(self, name: str) -> None:
        """Bring a model into memory."""
        with error_about(model=name):
            async with deadline(deadlines.LOAD, "LoadModel"):
                await self.engine.load_model(name)

    async def unload_model(self, name: str) -> None:
        """Drain a model and free its memory."""
        with error_about(model=name):
            async with deadline(deadlines.LOAD, "UnloadModel"):
                await self.engine.unload_model(name)


def _cannot_serve(health: Health) -> UnavailableError:
    """Code 503 whatever the reason, which the id names."""
    error = UnavailableError(health.detail)
    if health.error is not None:
        error.id, error.fields = health.error.id, health.error.fields
    return error


async def _checked(service_name: str, messages: AsyncIterator[BidiMessage]) -> AsyncGenerator[BidiMessage, None]:
    """The messages, each of which an engine can understand. Raises InvalidRequestError at one that is not so."""
    conversation = CONVERSATIONS.get(service_name)
    async for message in messages:
        if conversation is not None:
            conversation.check(message.data, message.message_type, message.metadata)
        yield message


class _Heard:
    """A conversation's messages, which an engine can be given once more as long as it has answered nothing."""

    def __init__(self, messages: AsyncIterator[BidiMessage]) -> None:
        self._messages = messages
        self._said: list[BidiMessage] = []
        self._again: list[BidiMessage] = []
        self._all = True

    def __aiter__(self) -> AsyncIterator[BidiMessage]:
        return self

    async def __anext__(self) -> BidiMessage:
        if self._again:
            return self._again.pop(0)
        message = await anext(self._messages)
        self._all = self._all and len(self._said) < _MOST_HEARD
        if self._all:
            self._said.append(message)
        else:
            self._said.clear()
        return message

    def rewind(self) -> bool:
        """Begin again; False when too much was said to remember it."""
        self._again = list(self._said)
        return self._all

    def forget(self) -> None:
        """Remember nothing more."""
        self._all = False
        self._said.clear()


async def _opening(
    service_name: str, answers: AsyncIterator[BidiMessage]
) -> tuple[list[BidiMessage], EnginePluginError | None]:
    """What the engine says first, and, when that is that the conversation fails, why."""
    conversation = CONVERSATIONS.get(service_name)
    said: list[BidiMessage] = []
    try:
        async for answer in answers:
            said.append(answer)
            if conversation is None or not conversation.tells_failure(answer.data):
                break
    except EnginePluginError as error:
        return said, error
    return said, None


async def _going_on(
    said: Sequence[BidiMessage], failure: EnginePluginError | None, answers: AsyncIterator[BidiMessage]
) -> AsyncGenerator[BidiMessage, None]:
    """The answers of a conversation whose opening was looked at."""
    for answer in said:
        yield answer
    if failure is not None:
        raise failure
    async for answer in answers:
        yield answer


def _progress_log(operation: str) -> Progress:
    """Progress as log lines, marked with `progress`, by which a host's log can show a person the steps.

    A download tells of each percent, twice a second at most, with `completed` and `total` bytes.
    """
    told = _Told()

    def tell(step: str | ChunkProgress) -> None:
        if isinstance(step, str):
            log.info("%s", step, extra={"progress": operation})
        elif told.is_due(step):
            of = f" of {byte_size(step.total)}" if step.total else ""
            numbers = {"completed": step.completed, "total": step.total, "digest": step.digest}
            log.info("%s%s are here", byte_size(step.completed), of, extra={"progress": operation, **numbers})

    return tell


class _Told:
    """Which of many progress events are worth a line."""

    def __init__(self) -> None:
        self._last: tuple[object, ...] = ()
        self._at = 0.0

    def is_due(self, step: ChunkProgress) -> bool:
        share = 100 * step.completed // step.total if step.total else step.completed // _LINE_BYTES
        now, over = (step.digest, step.total, share), 0 < step.total == step.completed
        if now == self._last or (time.monotonic() < self._at + _LINE_S and not over):
            return False
        self._last, self._at = now, time.monotonic()
        return True
