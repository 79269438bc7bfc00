"""The interface between a plugin and its engine.

`Plugin` creates one engine from the manifest, calls it from one event loop and closes it. Engines are found
by the entry point group `engine_plugin.engines`, so a third party's engine is a pip install away.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.errors import UnsupportedError
from engine_plugin.services import VALIDATORS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager

    from engine_plugin.download.events import ChunkProgress, PullEvent
    from engine_plugin.errors import EnginePluginError, Problem
    from engine_plugin.manifest import Manifest, ServiceSpec
    from engine_plugin.messages import BidiMessage
    from engine_plugin.models.store import ModelInfo, PullRequest
    from engine_plugin.services import RequestValidator

__all__ = [
    "ENTRY_POINTS",
    "Engine",
    "EngineCheck",
    "EngineConfig",
    "Health",
    "HealthState",
    "Progress",
    "engine_class",
    "not_bidirectional",
]

ENTRY_POINTS = "engine_plugin.engines"

if TYPE_CHECKING:
    Progress = Callable[[str | ChunkProgress], None]
    """Told each step of a long operation, in words for a person, and how far a download is."""


class HealthState(Enum):
    """What an engine can do now. DEGRADED still serves, worse than it should."""

    READY = "ready"
    DEGRADED = "degraded"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Health:
    """An engine's health and, in words, why; of one that cannot serve, `error` names the reason for programs."""

    state: HealthState
    detail: str
    error: EnginePluginError | None = None

    @classmethod
    def dead(cls, error: EnginePluginError) -> Health:
        """That of an engine that cannot serve for this reason."""
        return cls(HealthState.DEAD, str(error), error)


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """Whether the engine's software is on this machine, and which one (or what is missing)."""

    installed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """EngineRecommendConfig of the wire. Empty where the engine has no such thing."""

    host: str = ""
    origin: str = ""
    scheme: str = ""
    recommend_model: str = ""
    download_url: str = ""
    download_path: str = ""
    engine_path: str = ""
    exec_path: str = ""
    exec_file: str = ""
    device_type: str = ""


class Engine(ABC):
    """One inference engine under a plugin's control.

    Every method may be called at any time and concurrently with every other. Cancelling a call abandons only
    that caller's wait, except that a cancelled `call` or `stream` stops the engine's work on it. Errors are
    those of `engine_plugin.errors`.
    """

    services: ClassVar[frozenset[str]]
    """The services that this engine can answer."""

    def __init__(self, manifest: Manifest) -> None:
        """Read the engine's options; no I/O. Raises ManifestError, naming the line, for a bad option."""
        self.manifest = manifest

    @staticmethod
    def check_options(manifest: Manifest) -> Sequence[Problem]:  # noqa: ARG004  # for engines with options
        """What is wrong with the `engine:` section of plugin.yaml. Called by lint; `__init__` raises the same."""
        return ()

    # Software. Called for CheckEngine, InstallEngine, UpgradeEngine, InitEnv, GetVersion and GetConfig.

    @abstractmethod
    async def check(self) -> EngineCheck:
        """Say whether the software is present. Changes nothing."""

    @abstractmethod
    async def install(self, progress: Progress, *, cover: bool) -> str:
        """Put the software on this machine and return what is installed now.

        Present and not `cover`: nothing is done. Concurrent calls share one installation. Raises InstallError,
        leaving what was there.
        """

    @abstractmethod
    async def upgrade(self, progress: Progress) -> str:
        """Replace the software by the version that the manifest asks for and return what is installed now.

        Already there: nothing is done, the engine is not disturbed. A running engine is running afterwards.
        """

    @abstractmethod
    async def init_env(self) -> None:
        """Create the directories and settings that `start` needs. Idempotent."""

    @abstractmethod
    async def version(self) -> str:
        """The engine's real version. Raises EngineNotInstalledError."""

    @abstractmethod
    def config(self) -> EngineConfig:
        """Where the engine lives and what it would serve."""

    # Life. Called for StartEngine, StopEngine, HealthCheck, and when the plugin ends.

    @abstractmethod
    async def start(self, mode: str) -> None:
        """Make the engine ready to serve; `mode` is auto, cpu or gpu. Ready already: return at once.

        Concurrent callers share one start. Raises EngineNotInstalledError or EngineStartError.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Stop the engine and wait until no process of it is left. Aborts a start. Idempotent."""

    @abstractmethod
    async def health(self) -> Health:
        """Ask the engine, within a few seconds, how it is."""

    async def aclose(self) -> None:
        """Stop, and release what `__init__` or any call acquired. The engine is not used afterwards."""
        await self.stop()

    # Models.

    @abstractmethod
    async def list_models(self) -> Sequence[ModelInfo]:
        """Every model that a call may name now."""

    @abstractmethod
    def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        """Fetch a model and yield what happens; ends after Success, raises PullError or ModelNotFoundError.

        Closing the iterator early keeps what arrived for the next attempt.
        """

    @abstractmethod
    async def delete_model(self, name: str) -> None:
        """Delete a model from this machine. Raises ModelNotFoundError, ModelInUseError."""

    @abstractmethod
    async def load_model(self, name: str) -> None:
        """Bring a model into memory and wait until it can answer. Loaded already: return at once."""

    @abstractmethod
    async def unload_model(self, name: str) -> None:
        """Let running requests of a model end, then free its memory. Raises ModelNotLoadedError."""

    @abstractmethod
    async def running_models(self) -> Sequence[ModelInfo]:
        """The models in memory."""

    # Service calls, for InvokeService, InvokeServiceStream and InvokeServiceBidi.

    def validator(self, service: ServiceSpec) -> RequestValidator | None:
        """Return what checks a request of this service; None for a service without requests. Called by `Plugin`.

        An engine that speaks a second flavour of JSON, which `service.config_ref` names, returns a validator for it.
        """
        return VALIDATORS.get(service.service_name)

    @abstractmethod
    async def default_model(self, service: str) -> str:
        """The model for a call that names none, when neither the user nor plugin.yaml has chosen one; "" for none."""

    async def default_models(self, services: Iterable[str]) -> dict[str, str]:
        """The `default_model` of each service. For GetManifest; overridden where one look answers for all."""
        return {service: await self.default_model(service) for service in services}

    async def is_sample(self, name: str) -> bool:  # noqa: ARG002  # for engines with samples
        """Whether a name means a sample of the package, which a model of the user's own replaces as the default."""
        return False

    @abstractmethod
    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        """Answer one request (validated by its service, `model` filled in) with a JSON object as UTF-8."""

    @abstractmethod
    def stream(self, service: str, request: dict[str, Any]) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Answer one request in chunks of whole server-sent events.

        Leaving the context, for whatever reason, stops the engine's work on the request. An error after the
        first chunk is raised out of the iterator.
        """

    def converse(
        self,
        service: str,
        messages: AsyncIterator[BidiMessage],  # noqa: ARG002  # for engines that converse
        default_model: str,  # noqa: ARG002
    ) -> AbstractAsyncContextManager[AsyncIterator[BidiMessage]]:
        """Answer a conversation message by message; `messages` ends when the host has half-closed.

        `default_model` is for a conversation that names none. An error raised out of `messages` is the host's.
        Leaving the context stops the engine's work. Engines without bidirectional services keep this default.
        """
        raise not_bidirectional(service)


def not_bidirectional(service: str) -> UnsupportedError:
    """The error of an engine that does not converse, or not for this service."""
    return UnsupportedError(f"service_name: {service} is not bidirectional with this engine; call InvokeService")


class UnknownEngineError(UnsupportedError):
    """No installed distribution brings the engine that plugin.yaml names. The text is `what` and then `fix`."""

    fix = "Correct engine.name in plugin.yaml or pip-install the package that brings this engine"

    def __init__(self, name: str, known: Iterable[str]) -> None:
        installed = ", ".join(sorted(known)) or "none"
        self.what = f"engine.name: no engine is called {name!r}; installed engines: {installed}"
        super().__init__(f"{self.what}. {self.fix}.")


def engine_class(name: str) -> type[Engine]:
    """The engine class that an installed distribution registered under `name`. Raises UnknownEngineError."""
    found = entry_points(group=ENTRY_POINTS)
    for point in found:
        if point.name == name:
            loaded: type[Engine] = point.load()
            return loaded
    raise UnknownEngineError(name, [point.name for point in found])
