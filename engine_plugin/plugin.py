"""A plugin: its manifest, its engine, its services and their deadlines. Knows neither gRPC nor HTTP.

Called by `server.servicer` for hosts and the command line.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from engine_plugin import catalogue, conversations, deadlines
from engine_plugin.deadlines import deadline
from engine_plugin.download.source import without_secrets
from engine_plugin.engines.base import HealthState
from engine_plugin.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
    UnsupportedError,
    error_about,
)
from engine_plugin.jsontext import BRIEF
from engine_plugin.models.available import AvailableModels, names_for
from engine_plugin.models.defaults import DefaultModels
from engine_plugin.protocol.shapes import OperateStatus
from engine_plugin.system.files import in_thread
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterator, Sequence
    from pathlib import Path

    from engine_plugin.download.events import ChunkProgress, PullEvent
    from engine_plugin.engines.base import Engine, Health
    from engine_plugin.manifest import Manifest, ServiceSpec
    from engine_plugin.messages import ConversationMessage
    from engine_plugin.models.missing import MissingModels
    from engine_plugin.models.store import ModelInfo, PullRequest
    from engine_plugin.protocol.shapes import EngineCheck, EngineConfig
    from engine_plugin.services import RequestValidator

__all__ = ["MODES", "Plugin", "ProgressLog"]

log = logging.getLogger(__name__)

MODES = {"": "auto", "auto": "auto", "daemon": "auto", "standard": "auto", "cpu": "cpu", "gpu": "gpu", "npu": "npu"}
"""StartEngine's modes as hosts send them, and the mode that the engine gets."""

_LINE_S = 0.5
_LINE_BYTES = 16 * 1024 * 1024
"""Download progress is logged at most once in so many seconds; for an unknown size, once in so many bytes."""

_RAISE = "Raise services[].timeout in plugin.yaml, or make it negative for no deadline"


class _Default(NamedTuple):
    """A default model ("" for none) and the file that configures it; None where the engine chose it."""

    model: str
    place: Path | None


class Plugin:
    """Answers the services that the manifest declares, with one engine. Used from one event loop."""

    def __init__(self, manifest: Manifest, engine: Engine) -> None:
        self.manifest = manifest
        self.engine = engine
        # AOG's keep-alive starts the engine only while the status is not STOPPED.
        self._status = OperateStatus.RUNNING
        self._defaults = DefaultModels(manifest.data_dir, manifest.engine_name)
        self._available = AvailableModels(engine.list_models)

    @cached_property
    def _missing(self) -> MissingModels:
        """The pulls of missing models; loaded when they are needed, for a plugin starts sooner without them."""
        from engine_plugin.models.missing import MissingModels

        return MissingModels(self.engine.pull_model, lambda: ProgressLog("PullModel"))

    async def aclose(self) -> None:
        """Stop the engine and release what the plugin holds. The plugin is not used afterwards."""
        await self._available.aclose()
        if "_missing" in vars(self):
            await self._missing.aclose()
        await self.engine.aclose()

    async def manifest_json(self) -> bytes:
        """Return plugin.yaml as JSON for GetManifest, with the default models that apply now.

        A service for which plugin.yaml lists no models gets those that can serve it.
        """
        services = self.manifest.services.values()
        defaults = {name: found.model for name, found in (await self._configured(services)).items()}
        models = () if all(service.support_models for service in services) else await self._available.models()
        return self.manifest.to_json(
            {name: names_for(name, default, models) for name, default in defaults.items()}, defaults
        )

    # Services

    async def invoke(self, service_name: str, data: bytes) -> bytes:
        """Answer one request with a JSON object. Raises DeadlineError after plugin.yaml's timeout.

        With `auto_pull` in plugin.yaml a missing model is pulled first; the pull does not count towards the timeout.
        """
        with error_about(service=service_name):
            try:
                return await self._invoke(service_name, data)
            except ModelNotFoundError as error:
                await self._fetch_missing(error)
            return await self._invoke(service_name, data)

    async def _invoke(self, service_name: str, data: bytes) -> bytes:
        service, validator, request, default = await self._prepare(service_name, data)
        trivial = validator.trivial_answer(request)
        if trivial is not None:
            return json.dumps(trivial).encode()
        with error_about(model=request["model"]), self._naming_default(service, default):
            async with deadline(deadlines.allowed(service, "unary"), service_name, _RAISE):
                return await self.engine.call(service_name, request)

    @asynccontextmanager
    async def stream(self, service_name: str, data: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """Answer one request in chunks of whole events.

        The deadline covers the whole block; leaving the block stops the engine's work. A missing model is pulled as
        for `invoke`.
        """
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
        service, _validator, request, default = await self._prepare(service_name, data)
        if not service.capabilities.support_streaming:
            raise catalogue.STREAM_UNSUPPORTED.error(
                service=service_name, engine="this plugin.yaml (support_streaming)"
            )
        with error_about(model=request["model"]), self._naming_default(service, default):
            async with (
                deadline(deadlines.allowed(service, "stream"), service_name, _RAISE),
                self.engine.stream(service_name, request) as chunks,
            ):
                yield chunks

    @asynccontextmanager
    async def converse(
        self, service_name: str, messages: AsyncIterator[ConversationMessage]
    ) -> AsyncIterator[AsyncIterator[ConversationMessage]]:
        """Hold a conversation. Without a positive timeout in plugin.yaml it has no deadline.

        A missing model is pulled as for `invoke`, before the first answer.
        """
        with error_about(service=service_name):
            service = self._declared(service_name)
            if not service.capabilities.support_bidirectional:
                raise UnsupportedError(
                    f"service_name: {service_name} is not bidirectional; call InvokeService or InvokeServiceStream"
                )
            default = await self._default(service)
            async with aclosing(conversations.checked(service_name, messages)) as checked:
                begin = self._pulling_conversation if self.manifest.auto_pull else self._conversation
                async with begin(service, checked, default) as answers:
                    yield answers

    @asynccontextmanager
    async def _pulling_conversation(
        self, service: ServiceSpec, messages: AsyncIterator[ConversationMessage], default: _Default
    ) -> AsyncIterator[AsyncIterator[ConversationMessage]]:
        """A conversation that is begun again, with the same messages, once its missing model has been pulled."""
        replayable = conversations.Replayable(messages)
        async with AsyncExitStack() as stack:
            answers = await stack.enter_async_context(self._conversation(service, replayable, default))
            opening, failure = await conversations.opening(service.service_name, answers)
            if isinstance(failure, ModelNotFoundError) and failure.pull and replayable.rewind():
                await stack.aclose()
                await self._fetch_missing(failure)
                answers = await stack.enter_async_context(self._conversation(service, replayable, default))
            else:
                answers = await stack.enter_async_context(aclosing(conversations.resumed(opening, failure, answers)))
            replayable.forget()
            yield answers

    @asynccontextmanager
    async def _conversation(
        self, service: ServiceSpec, messages: AsyncIterator[ConversationMessage], default: _Default
    ) -> AsyncIterator[AsyncIterator[ConversationMessage]]:
        with self._naming_default(service, default):
            async with (
                deadline(deadlines.allowed(service, "bidi"), service.service_name, _RAISE),
                self.engine.converse(service.service_name, messages, default.model) as answers,
            ):
                yield answers

    async def _fetch_missing(self, error: ModelNotFoundError) -> None:
        """Pull the missing model if plugin.yaml allows it and the error names a source; else raise `error`."""
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

    async def _configured(self, services: Collection[ServiceSpec]) -> dict[str, _Default]:
        """The default model of each service by the user's choice, plugin.yaml or the models on this machine.

        A pulled model takes precedence over a sample, even one that plugin.yaml names. The engine is asked once.
        """
        found: dict[str, _Default] = {}
        samples: list[str] = []
        for service in services:
            name, declared = service.service_name, service.default_model
            if chosen := await self._defaults.of(name):
                found[name] = _Default(chosen, self._defaults.path)
            else:
                found[name] = _Default(declared, self.manifest.path)
                if declared and await self.engine.is_sample(declared):
                    samples.append(name)
        for name, model in (await self.engine.default_models(samples)).items() if samples else ():
            if model not in ("", found[name].model):
                found[name] = _Default(model, None)
        return found

    async def _default(self, service: ServiceSpec) -> _Default:
        """The model for a call that names none: the configured one, else the engine's choice, else ""."""
        [found] = (await self._configured([service])).values()
        return found if found.model else _Default(await self.engine.default_model(service.service_name), None)

    @contextmanager
    def _naming_default(self, service: ServiceSpec, default: _Default | None) -> Iterator[None]:
        """Name the file that configures a missing default model. `default` is None if the call named its model."""
        try:
            yield
        except ModelNotFoundError as error:
            if default is None or default.place is None or error.model != default.model:
                raise
            place = str(default.place)
            raise catalogue.default_missing(default.model, service.service_name, place, pull=error.pull) from error

    async def _prepare(
        self, service_name: str, data: bytes
    ) -> tuple[ServiceSpec, RequestValidator, dict[str, Any], _Default | None]:
        """Check a request once.

        Returns the service, its validator, the request with a model in it, and the default model if the request
        named none.
        """
        spec = self._declared(service_name)
        validator = self.engine.validator(spec)
        if validator is None:
            raise UnsupportedError(
                f"service_name: {service_name} cannot be called with a JSON request; use InvokeServiceBidi"
            )
        request = validator.read(data) if len(data) <= BRIEF else await in_thread(validator.read, data)
        default = None
        if not request.get("model"):
            default = await self._default(spec)
            request["model"] = default.model
            if not default.model:
                raise InvalidRequestError.at(
                    "model", f"is missing, and plugin.yaml has no default_model for {service_name}"
                )
        return spec, validator, request, default

    # Start and stop

    @property
    def status(self) -> OperateStatus:
        """The status set by the host or by the last start or stop."""
        return self._status

    def set_status(self, status: int) -> None:
        """Set the status for SetOperateStatus. Raises InvalidRequestError for an unknown number."""
        try:
            self._status = OperateStatus(status)
        except ValueError:
            known = ", ".join(f"{known.value} {known.name.lower()}" for known in OperateStatus)
            raise InvalidRequestError.at("status", f"{status} is unknown; it must be {known}") from None

    async def start(self, mode: str) -> None:
        """Start the engine in one of MODES. Raises InvalidRequestError for another mode."""
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
        """Stop the engine and set the status to STOPPED."""
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
        """Check whether the engine's software is installed."""
        async with deadline(deadlines.CHECK, "CheckEngine"):
            return await self.engine.check()

    async def install(self, *, cover: bool) -> str:
        """Install the engine's software; returns what is installed."""
        async with deadline(deadlines.INSTALL, "InstallEngine"):
            return await self.engine.install(ProgressLog("InstallEngine"), cover=cover)

    async def upgrade(self) -> str:
        """Upgrade the engine's software; returns what is installed."""
        async with deadline(deadlines.INSTALL, "UpgradeEngine"):
            return await self.engine.upgrade(ProgressLog("UpgradeEngine"))

    async def init_env(self) -> None:
        """Create the directories and settings that a start needs."""
        async with deadline(deadlines.CHECK, "InitEnv"):
            await self.engine.init_env()

    async def version(self) -> str:
        """The engine's version."""
        async with deadline(deadlines.CHECK, "GetVersion"):
            return await self.engine.version()

    def config(self) -> EngineConfig:
        """Where the engine is installed and which address it serves, for GetConfig."""
        return self.engine.config()

    # Models

    async def list_models(self) -> Sequence[ModelInfo]:
        """The models that a call may name."""
        async with deadline(deadlines.CHECK, "ListModels"):
            return await self.engine.list_models()

    async def running_models(self) -> Sequence[ModelInfo]:
        """The models in memory."""
        return await self.engine.running_models()

    @asynccontextmanager
    async def pull_model(self, request: PullRequest) -> AsyncIterator[AsyncIterator[PullEvent]]:
        """Pull a model: the events of the pull, which leaving the block cancels.

        Only the host's deadline applies, since size and network decide how long it takes.
        """
        with error_about(model=without_secrets(request.model)):
            async with aclosing(self.engine.pull_model(request)) as events:
                yield events

    async def delete_model(self, name: str) -> None:
        """Delete a model."""
        with error_about(model=name):
            async with deadline(deadlines.STOP, "DeleteModel"):
                await self.engine.delete_model(name)

    async def load_model(self, name: str) -> None:
        """Load a model into memory."""
        with error_about(model=name):
            async with deadline(deadlines.LOAD, "LoadModel"):
                await self.engine.load_model(name)

    async def unload_model(self, name: str) -> None:
        """Let a model's running requests end, then free its memory."""
        with error_about(model=name):
            async with deadline(deadlines.LOAD, "UnloadModel"):
                await self.engine.unload_model(name)


def _cannot_serve(health: Health) -> UnavailableError:
    """An error with code 503; its id names the reason."""
    error = UnavailableError(health.detail)
    if health.error is not None:
        error.id, error.fields = health.error.id, health.error.fields
    return error


class ProgressLog:
    """A callback that logs progress, marked with `progress` so that a host's log can show the steps.

    A download logs each percent, at most twice a second, with its `completed` and `total` bytes.
    """

    def __init__(self, operation: str) -> None:
        self._operation = operation
        self._last: tuple[object, ...] = ()
        self._at = 0.0

    def __call__(self, step: str | ChunkProgress) -> None:
        if isinstance(step, str):
            log.info("%s", step, extra={"progress": self._operation})
        elif self._is_due(step):
            of = f" of {byte_size(step.total)}" if step.total else ""
            numbers = {"completed": step.completed, "total": step.total, "digest": step.digest}
            extra = {"progress": self._operation, **numbers}
            log.info("%s%s downloaded", byte_size(step.completed), of, extra=extra)

    def _is_due(self, step: ChunkProgress) -> bool:
        share = 100 * step.completed // step.total if step.total else step.completed // _LINE_BYTES
        now, over = (step.digest, step.total, share), 0 < step.total == step.completed
        if now == self._last or (time.monotonic() < self._at + _LINE_S and not over):
            return False
        self._last, self._at = now, time.monotonic()
        return True
