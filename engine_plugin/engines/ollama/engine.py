"""The driver of the engine `ollama`: it uses an attached server, or runs a managed one."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from contextlib import aclosing, asynccontextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin import catalogue
from engine_plugin.engines.base import Engine, Health, HealthState, not_bidirectional
from engine_plugin.engines.ollama.address import configured_address
from engine_plugin.engines.ollama.attached import AttachedOllama
from engine_plugin.engines.ollama.models import FEATURE_OF_SERVICE, ServerModels
from engine_plugin.engines.ollama.native import native_validator
from engine_plugin.engines.ollama.options import OllamaOptions
from engine_plugin.engines.ollama.references import References
from engine_plugin.engines.options import option_problems, read_options
from engine_plugin.errors import (
    AuthError,
    EngineNotInstalledError,
    EnginePluginError,
    ManifestError,
    ModelInUseError,
    ModelNotFoundError,
    PreconditionError,
    UnsupportedError,
)
from engine_plugin.process.environ import child_environ
from engine_plugin.protocol.shapes import EngineCheck, EngineConfig
from engine_plugin.single_flight import SingleFlight

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from engine_plugin.download.events import PullEvent
    from engine_plugin.engines.base import Progress
    from engine_plugin.engines.ollama.address import ServerAddress
    from engine_plugin.engines.ollama.client import OllamaClient
    from engine_plugin.engines.ollama.exchange import Exchange
    from engine_plugin.engines.ollama.managed import ManagedServer
    from engine_plugin.engines.ollama.pulls import Pulls
    from engine_plugin.errors import Problem
    from engine_plugin.manifest import Manifest, ServiceSpec
    from engine_plugin.messages import ConversationMessage
    from engine_plugin.models.info import ModelInfo
    from engine_plugin.models.request import PullRequest
    from engine_plugin.services import RequestValidator
    from engine_plugin.speech.services import SpeechServices

__all__ = ["OllamaEngine"]

log = logging.getLogger(__name__)


class OllamaEngine(Engine):
    """`Engine` on Ollama servers.

    An attached server is found by the first call that needs it and never stopped. A managed server runs from start to
    stop.
    """

    services: ClassVar[frozenset[str]] = frozenset(FEATURE_OF_SERVICE)

    def __init__(self, manifest: Manifest) -> None:
        options = read_options(OllamaOptions, manifest)
        super().__init__(manifest)
        self._options = options
        environ = self._environ = child_environ(os.environ)
        self._attached = AttachedOllama(_address(manifest, options, environ), options, environ)
        self._models = ServerModels(options, References(manifest.data_dir / "references.json"))
        self._users: Counter[str] = Counter()
        self._starting: SingleFlight[None] = SingleFlight("starting Ollama")
        self._installing: SingleFlight[str] = SingleFlight("installing Ollama")
        self._lifecycle = asyncio.Lock()
        self._stopped = False

    @staticmethod
    def check_options(manifest: Manifest) -> Sequence[Problem]:
        """The problems of the `engine:` section. Called by `engine-plugin lint`."""
        return option_problems(OllamaOptions, manifest)

    # Parts that are loaded when they are needed: a plugin starts sooner without them

    @cached_property
    def _managed(self) -> ManagedServer:
        from engine_plugin.engines.ollama.managed import ManagedServer

        return ManagedServer(self._options, self._models, self.manifest.data_dir, self._environ)

    async def _managed_client(self) -> OllamaClient:
        return await self._managed.client()

    @property
    def _manages(self) -> bool:
        """Whether the managed server was started and not stopped since."""
        return "_managed" in vars(self) and self._managed.running

    @cached_property
    def _pulls(self) -> Pulls:
        from engine_plugin.engines.ollama.pulls import Pulls

        return Pulls(self._models)

    @cached_property
    def _speech(self) -> SpeechServices:
        from engine_plugin.speech.decoder import Decoder
        from engine_plugin.speech.services import SpeechServices

        options = self._options
        return SpeechServices("/v1", Decoder(None, self._environ, options.audio), _NO_VOICES, options.live)

    # Which server

    async def _client(self) -> OllamaClient:
        """The client of the server to use; none is started. Raises UnavailableError with the next step."""
        if self._stopped:
            raise catalogue.ENGINE_NOT_RUNNING.error()
        if self._manages:
            return await self._managed.client()
        client = await self._attached.find()
        if client is None:
            raise await self._no_server()
        return client

    async def _client_for_change(self) -> OllamaClient:
        """The client for pulls and deletes, which start the managed server if there is no attached one."""
        idle = not (self._stopped or self._manages)
        if idle and await self._attached.find() is None and await self._can_manage():
            await self.start("auto")
        return await self._client()

    async def _can_manage(self) -> bool:
        """Whether a managed server can be started where there is no attached one."""
        return self._options.server != "attach" and (await self._managed.check()).installed

    async def _no_server(self) -> EnginePluginError:
        """The error for a call without a server."""
        if self._options.server == "manage" or await self._can_manage():
            return catalogue.ENGINE_NOT_RUNNING.error()
        return self._attached.unreachable()

    # Software

    async def check(self) -> EngineCheck:
        if await self._is_attached():
            return EngineCheck(installed=True, detail=self._attached.description)
        server, managed = self._options.server, await self._managed.check()
        if server == "manage" or (server == "auto" and (managed.installed or self._options.ollama)):
            return managed
        return EngineCheck(False, str(self._attached.unreachable()))

    async def install(self, progress: Progress, *, cover: bool) -> str:
        if await self._is_attached():
            return f"{self._attached.description}; {_MANAGE}"
        if self._options.server == "attach":
            raise self._attached.unreachable()
        return await self._installing.run(lambda: self._managed.install(progress, cover=cover))

    async def upgrade(self, progress: Progress) -> str:
        if await self._is_attached():
            return f"nothing to upgrade: {self._attached.description}; {_MANAGE}"
        if self._options.server == "attach":
            return f"nothing to upgrade: {self._attached.unreachable()}"
        return await self._installing.run(lambda: self._managed.upgrade(progress))

    async def _is_attached(self) -> bool:
        """Whether there is an attached server, including one that StopEngine has detached."""
        if self._manages:
            return False
        try:
            return await self._attached.find(refresh=True) is not None
        except (AuthError, PreconditionError):  # it answers, but cannot be used
            return True

    async def init_env(self) -> None:
        await self._managed.init_env()

    async def version(self) -> str:
        if await self._is_attached():
            if not self._attached.version:
                await self._attached.find()  # raises the reason
            return self._attached.version
        if self._options.server == "attach":
            raise EngineNotInstalledError(str(self._attached.unreachable()))
        return await self._managed.version()

    def config(self) -> EngineConfig:
        if self._manages or self._options.server == "manage":
            return self._managed.config()
        return EngineConfig(
            host=self._attached.address.authority,
            scheme=self._attached.address.scheme,
            engine_path=str(self.manifest.data_dir),
            download_url="https://ollama.com/download",
            download_path=self._managed.config()["download_path"],
        )

    # Life

    async def start(self, mode: str) -> None:
        if mode == "npu":
            raise UnsupportedError("mode: Ollama does not compute on an NPU; start in mode auto, cpu or gpu")
        await self._starting.run(lambda: self._start(mode))
        if self._manages:
            await self._managed.change_mode(mode)

    async def _start(self, mode: str) -> None:
        async with self._lifecycle:
            if self._manages:
                await self._managed.start(mode)  # again, if its process has failed
            elif await self._attached.find(refresh=True) is not None:
                if mode != "auto":
                    log.info("mode %s has no effect: %s", mode, self._attached.description)
            elif self._options.server == "manage" or await self._can_manage():
                await self._managed.start(mode)
            else:
                raise self._attached.unreachable()
            self._stopped = False

    async def stop(self) -> None:
        self._stopped = True
        await self._starting.cancel()
        async with self._lifecycle:
            self._stopped = True  # again: a start that ended meanwhile has reset it
            if "_pulls" in vars(self):
                await self._pulls.aclose()
            await self._attached.detach()
            if self._manages:
                await self._managed.stop()

    async def aclose(self) -> None:
        await self._installing.cancel()
        await self.stop()

    async def health(self) -> Health:
        if self._stopped:
            return Health.dead(catalogue.ENGINE_NOT_RUNNING.error())
        if self._manages:
            return await self._managed.health()
        if await self._attached.find(refresh=True) is None:
            return Health.dead(await self._no_server())
        address = self._attached.address
        where = f"{address.url} ({address.ignored})" if address.ignored else address.url
        return Health(HealthState.READY, f"attached to Ollama {self._attached.version} at {where}")

    # Models

    async def list_models(self) -> Sequence[ModelInfo]:
        return await self._models.all(await self._client())

    async def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        async with aclosing(self._pulls.pull(await self._client_for_change(), request)) as events:
            async for event in events:
                yield event

    async def delete_model(self, name: str) -> None:
        client = await self._client_for_change()
        model = await self._models.get(client, name)
        users = self._users[model.name]
        if users:
            raise ModelInUseError(f"model: {model.name} is answering {users} requests; delete it after they end")
        await self._models.delete(client, model.name)

    async def load_model(self, name: str) -> None:
        await self._models.load(await self._client(), name)

    async def unload_model(self, name: str) -> None:
        await self._models.unload(await self._client(), name, self._options.drain_timeout)

    async def running_models(self) -> Sequence[ModelInfo]:
        if self._stopped or not (self._manages or await self._attached.find() is not None):
            return ()
        return await self._models.running(await self._client())

    # Services

    def validator(self, service: ServiceSpec) -> RequestValidator | None:
        native = native_validator(service.service_name) if _is_native(service) else None
        return native or super().validator(service)

    async def default_model(self, service: str) -> str:
        return await self._models.default(await self._client(), service)

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        async with self._exchange(service, request["model"]) as (exchange, _):
            if service == "speech-to-text":
                return await exchange.transcribe(self._speech, request)
            return await exchange.call(request)

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._exchange(service, request["model"]) as (exchange, _), exchange.stream(request) as chunks:
            yield chunks

    def converse(
        self, service: str, messages: AsyncIterator[ConversationMessage], default_model: str
    ) -> AbstractAsyncContextManager[AsyncIterator[ConversationMessage]]:
        if service != "speech-to-text-ws":
            raise not_bidirectional(service)
        return self._speech.converse(partial(self._exchange, service), default_model, messages)

    @asynccontextmanager
    async def _exchange(self, service: str, name: str) -> AsyncIterator[tuple[Exchange, str]]:
        """The exchange for a call, and the server's name of its model, which counts as in use meanwhile.

        Raises ModelNotFoundError, and InvalidRequestError for a model that does not support the service.
        """
        from engine_plugin.engines.ollama.exchange import Exchange

        client = await self._client()
        model = await self._models.get(client, name)
        wanted = FEATURE_OF_SERVICE[service]
        if wanted not in model.capabilities.features:
            kind, needed = f"{model.kind} ({', '.join(model.capabilities.features)})", _KIND_WORDS[wanted]
            raise catalogue.MODEL_KIND_MISMATCH.error(model=model.name, kind=kind, service=service, wanted=needed)
        self._users[model.name] += 1
        try:
            facts = self._models.facts(model, native=_is_native(self.manifest.service(service)))
            yield Exchange(client, service, facts, self._managed_client), model.name
        except ModelNotFoundError:
            self._models.invalidate()  # deleted on the server
            raise
        finally:
            self._users[model.name] -= 1
            if not self._users[model.name]:
                del self._users[model.name]


_NO_VOICES = Path()
_MANAGE = "set engine.server: manage in plugin.yaml for a managed server"
_KIND_WORDS = {"completion": "chat", "embedding": "embed", "transcription": "chat that hears audio"}


def _is_native(service: ServiceSpec) -> bool:
    """Whether the host uses Ollama's own JSON for the service, not OpenAI's."""
    return service.config_ref.partition(":")[0] == "ollama"


def _address(manifest: Manifest, options: OllamaOptions, environ: dict[str, str]) -> ServerAddress:
    """The address of the attached server. Raises ManifestError for an invalid engine_host."""
    try:
        return configured_address(options.address, manifest.provider.engine_host, environ)
    except ValueError as error:
        fix = "Use an address such as http://127.0.0.1:11434, or leave it empty"
        raise ManifestError([manifest.problem(("provider", "engine_host"), str(error), fix)]) from None
