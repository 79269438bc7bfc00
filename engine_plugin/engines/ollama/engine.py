"""The Ollama engine: the server that answers here, or one of our own, and what is asked of it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin import catalogue
from engine_plugin.engines.base import Engine, Health, HealthState, not_bidirectional
from engine_plugin.engines.local.single_flight import SharedWork
from engine_plugin.engines.ollama import services, transcription
from engine_plugin.engines.ollama.address import attach_address
from engine_plugin.engines.ollama.attachment import Attachment
from engine_plugin.engines.ollama.connection import NotBegunError, OllamaClient
from engine_plugin.engines.ollama.managed import OwnServer
from engine_plugin.engines.ollama.models import FEATURE_OF_SERVICE, ServerModels
from engine_plugin.engines.ollama.options import OllamaOptions
from engine_plugin.engines.ollama.pulls import Pulls
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
from engine_plugin.speech.decoder import Decoder

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from engine_plugin.download.events import PullEvent
    from engine_plugin.engines.base import Progress
    from engine_plugin.engines.ollama.address import ServerAddress
    from engine_plugin.engines.ollama.models import ModelFacts
    from engine_plugin.errors import Problem
    from engine_plugin.manifest import Manifest, ServiceSpec
    from engine_plugin.messages import BidiMessage
    from engine_plugin.models.info import ModelInfo
    from engine_plugin.models.request import PullRequest
    from engine_plugin.services import RequestValidator

__all__ = ["OllamaEngine"]

log = logging.getLogger(__name__)


class OllamaEngine(Engine):
    """`Engine` on Ollama. A server that answers is used by whatever is called first, and never stopped; one of our
    own runs from start to stop."""

    services: ClassVar[frozenset[str]] = frozenset(FEATURE_OF_SERVICE)

    def __init__(self, manifest: Manifest) -> None:
        options = read_options(OllamaOptions, manifest)
        super().__init__(manifest)
        self._options = options
        environ = child_environ(os.environ)
        self._attachment = Attachment(_address(manifest, options, environ), options, environ)
        self._own = OwnServer(options, manifest.data_dir, environ)
        self._models = ServerModels(options, References(manifest.data_dir / "references.json"))
        self._pulls = Pulls(self._models)
        self._decoder = Decoder(None, environ, options.audio)
        self._users: Counter[str] = Counter()
        self._starting: SharedWork[None] = SharedWork("starting Ollama")
        self._installing: SharedWork[str] = SharedWork("installing Ollama")
        self._lifecycle = asyncio.Lock()
        self._stopped = False

    @staticmethod
    def check_options(manifest: Manifest) -> Sequence[Problem]:
        """What is wrong with the `engine:` section. Called by `engine-plugin lint`."""
        return option_problems(OllamaOptions, manifest)

    # Which server

    async def _client(self) -> OllamaClient:
        """The server that answers, without starting one. Raises UnavailableError, saying how to have one."""
        if self._stopped:
            raise catalogue.ENGINE_NOT_RUNNING.error()
        if self._own.running:
            return await self._own.client()
        client = await self._found()
        if client is None:
            raise await self._nobody()
        return client

    async def _client_for_change(self) -> OllamaClient:
        """The same, with our own server started when it is the one: models get there only through it."""
        if not self._stopped and not self._own.running and await self._found() is None and await self._is_ours():
            await self.start("auto")
        return await self._client()

    async def _found(self, *, anew: bool = False) -> OllamaClient | None:
        """The server of somebody else, where plugin.yaml lets us use it."""
        return None if self._options.server == "manage" else await self._attachment.find(anew=anew)

    async def _is_ours(self) -> bool:
        """Whether, with nobody else's server there, it is ours that is to run."""
        return self._options.server != "attach" and (await self._own.check()).installed

    async def _nobody(self) -> EnginePluginError:
        """Why there is no server to ask."""
        if self._options.server == "manage" or await self._is_ours():
            return catalogue.ENGINE_NOT_RUNNING.error()
        return self._down()

    def _down(self) -> EnginePluginError:
        if self._options.server == "attach":
            return self._attachment.down()
        return self._attachment.down("have the plugin run its own: call InstallEngine")

    # Software

    async def check(self) -> EngineCheck:
        if await self._is_theirs():
            return EngineCheck(installed=True, detail=self._whose())
        own = await self._own.check()
        if self._options.server == "attach" or not (
            own.installed or self._options.server == "manage" or self._options.ollama
        ):
            return EngineCheck(False, str(self._down()))
        return own

    async def install(self, progress: Progress, *, cover: bool) -> str:
        if await self._is_theirs():
            return f"{self._whose()}; {_MANAGE}"
        if self._options.server == "attach":
            raise self._down()
        return await self._installing.run(lambda: self._own.install(progress, cover=cover))

    async def upgrade(self, progress: Progress) -> str:
        if await self._is_theirs():
            return f"nothing to upgrade: {self._whose()}; {_MANAGE}"
        if self._options.server == "attach":
            return f"nothing to upgrade: {self._down()}"
        return await self._installing.run(lambda: self._own.upgrade(progress))

    async def _is_theirs(self) -> bool:
        """Whether somebody else's server is there to be used, also one that we were told to let go."""
        if self._own.running:
            return False
        try:
            return await self._found(anew=True) is not None
        except (AuthError, PreconditionError):  # there is one, though it does not serve us
            return True

    def _whose(self) -> str:
        """Whose server it is, for who asks about our software."""
        version = self._attachment.version
        named = f"Ollama {version}" if version else "an Ollama"
        return f"{named} at {self._attachment.address.url} is somebody else's, and is used as it is"

    async def init_env(self) -> None:
        await self._own.init_env()

    async def version(self) -> str:
        if await self._is_theirs():
            if not self._attachment.version:
                await self._found()  # says why it tells none
            return self._attachment.version
        if self._options.server == "attach":
            raise EngineNotInstalledError(str(self._down()))
        return await self._own.version()

    def config(self) -> EngineConfig:
        if self._own.running or self._options.server == "manage":
            return self._own.config()
        address: ServerAddress = self._attachment.address
        return EngineConfig(
            host=f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}",
            scheme=address.scheme,
            engine_path=str(self.manifest.data_dir),
            download_url="https://ollama.com/download",
            download_path=self._own.config()["download_path"],
        )

    # Life

    async def start(self, mode: str) -> None:
        if mode == "npu":
            raise UnsupportedError("mode: Ollama does not compute on an NPU; start in mode auto, cpu or gpu")
        await self._starting.run(lambda: self._start(mode))
        if self._own.running:
            await self._own.change_mode(mode)

    async def _start(self, mode: str) -> None:
        async with self._lifecycle:
            if not self._own.running and await self._found(anew=True) is not None:
                if mode != "auto":
                    log.info("mode %s is not for us to choose: %s", mode, self._whose())
            elif self._options.server == "attach":
                raise self._down()
            elif not self._own.running:
                if self._options.server == "auto" and not (await self._own.check()).installed:
                    raise self._down()
                await self._own.start(mode)
            else:
                await self._own.revive()
            self._stopped = False

    async def stop(self) -> None:
        self._stopped = True
        await self._starting.cancel()
        async with self._lifecycle:
            self._stopped = True  # a start that had just ended said otherwise
            await self._pulls.aclose()
            await self._attachment.detach()
            await self._own.stop()

    async def aclose(self) -> None:
        await self._installing.cancel()
        await self.stop()

    async def health(self) -> Health:
        if self._stopped:
            return Health.dead(catalogue.ENGINE_NOT_RUNNING.error())
        if self._own.running:
            return await self._own.health()
        if await self._found(anew=True) is None:
            return Health.dead(await self._nobody())
        address = self._attachment.address
        where = f"{address.url} ({address.passed_over})" if address.passed_over else address.url
        return Health(HealthState.READY, f"attached to Ollama {self._attachment.version} at {where}")

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
            raise ModelInUseError(f"model: {model.name} is answering {users} requests; delete it when they are done")
        await self._models.delete(client, model.name)

    async def load_model(self, name: str) -> None:
        await self._models.load(await self._client(), name)

    async def unload_model(self, name: str) -> None:
        await self._models.unload(await self._client(), name, self._options.drain_timeout)

    async def running_models(self) -> Sequence[ModelInfo]:
        if self._stopped or not (self._own.running or await self._found() is not None):
            return ()
        return await self._models.running(await self._client())

    # Services

    def validator(self, service: ServiceSpec) -> RequestValidator | None:
        native = services.validator(service) if _is_native(service) else None
        return native or super().validator(service)

    async def default_model(self, service: str) -> str:
        return await self._models.default(await self._client(), service)

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        while True:
            try:
                async with self._client_for(service, request["model"]) as (client, facts):
                    return await services.call(client, service, request, facts, self._options, self._decoder)
            except NotBegunError:
                if not self._own.running:
                    raise

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        if service not in ("chat", "generate"):
            raise catalogue.STREAM_UNSUPPORTED.error(service=service, engine="Ollama")
        while True:
            async with AsyncExitStack() as held:
                try:
                    client, facts = await held.enter_async_context(self._client_for(service, request["model"]))
                    answer = services.stream(client, service, request, facts, self._options)
                    chunks = await held.enter_async_context(answer)
                except NotBegunError:  # it waited for a server that was replaced
                    if not self._own.running:
                        raise
                    continue
                yield chunks
                return

    @asynccontextmanager
    async def converse(
        self, service: str, messages: AsyncIterator[BidiMessage], default_model: str
    ) -> AsyncIterator[AsyncIterator[BidiMessage]]:
        if service != "speech-to-text-ws":
            raise not_bidirectional(service)

        def use(name: str) -> AbstractAsyncContextManager[tuple[OllamaClient, ModelFacts]]:
            return self._client_for(service, name)

        async with transcription.converse(use, default_model, messages, self._decoder, self._options.live) as answers:
            yield answers

    @asynccontextmanager
    async def _client_for(self, service: str, name: str) -> AsyncIterator[tuple[OllamaClient, ModelFacts]]:
        """The server that answers, and what is to be known of the model, which counts as used meanwhile."""
        client = await self._client()
        model = await self._models.get(client, name)
        wanted = FEATURE_OF_SERVICE[service]
        if wanted not in model.capabilities.features:
            raise catalogue.MODEL_KIND_MISMATCH.error(
                model=model.name, kind=_can(model), service=service, wanted=_KIND_WORDS[wanted]
            )
        with self._in_use(model.name):
            try:
                yield client, self._models.facts(model, native=_is_native(self.manifest.service(service)))
            except ModelNotFoundError:
                self._models.forget()  # somebody has deleted it
                raise

    @contextmanager
    def _in_use(self, name: str) -> Iterator[None]:
        self._users[name] += 1
        try:
            yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]


_MANAGE = "set engine.server: manage in plugin.yaml to have one of our own"
_KIND_WORDS = {"completion": "chat", "embedding": "embed", "transcription": "chat that hears audio"}


def _is_native(service: ServiceSpec) -> bool:
    """Whether the host speaks Ollama's own JSON for it, not OpenAI's."""
    return service.config_ref.partition(":")[0] == "ollama"


def _can(model: ModelInfo) -> str:
    """What a model is for, in a message that says that it is not for this."""
    return f"{model.kind} ({', '.join(model.capabilities.features)})"


def _address(manifest: Manifest, options: OllamaOptions, environ: dict[str, str]) -> ServerAddress:
    """Where to look for a server. Raises ManifestError."""
    try:
        return attach_address(options.address, manifest.provider.engine_host, environ)
    except ValueError as error:
        fix = "Give an address such as http://127.0.0.1:11434, or leave it empty"
        key = ("engine", "address") if options.address else ("provider", "engine_host")
        raise ManifestError([manifest.problem(key, str(error), fix)]) from None
