"""The interface between a plugin and its engine.

`Plugin` creates one engine from the manifest, calls it from one event loop and closes it. Engines are found
by the entry point group `engine_plugin.engines`, so a third party can add one with a Python package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.errors import UnsupportedError
from engine_plugin.services import VALIDATORS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager

    from engine_plugin.download.events import ChunkProgress, PullEvent
    from engine_plugin.errors import EnginePluginError, Problem
    from engine_plugin.manifest import Manifest, ServiceSpec
    from engine_plugin.messages import ConversationMessage
    from engine_plugin.models.store import ModelInfo, PullRequest
    from engine_plugin.protocol.shapes import EngineCheck, EngineConfig
    from engine_plugin.services import RequestValidator

__all__ = [
    "Engine",
    "Health",
    "HealthState",
    "Progress",
    "engine_class",
    "not_bidirectional",
]

_ENTRY_POINTS = "engine_plugin.engines"

if TYPE_CHECKING:
    Progress = Callable[[str | ChunkProgress], None]
    """Called with each step of a long operation, as text, and with the progress of downloads."""


class HealthState(Enum):
    """Whether an engine can serve. A DEGRADED engine serves with restrictions."""

    READY = "ready"
    DEGRADED = "degraded"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Health:
    """An engine's health with its reason as text; for an engine that cannot serve, also as an `error`."""

    state: HealthState
    detail: str
    error: EnginePluginError | None = None

    @classmethod
    def dead(cls, error: EnginePluginError) -> Health:
        """The health of an engine that cannot serve, with the reason."""
        return cls(HealthState.DEAD, str(error), error)


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

    @classmethod
    def check_options(cls, manifest: Manifest) -> Sequence[Problem]:  # noqa: ARG003  # for engines with options
        """What is wrong with the `engine:` section of plugin.yaml. Called by lint; `__init__` raises the same."""
        return ()

    # Software. Called for CheckEngine, InstallEngine, UpgradeEngine, InitEnv, GetVersion and GetConfig.

    @abstractmethod
    async def check(self) -> EngineCheck:
        """Check whether the software is installed. Changes nothing."""

    @abstractmethod
    async def install(self, progress: Progress, *, cover: bool) -> str:
        """Install the software and return what is installed.

        Does nothing if it is installed and `cover` is false. Concurrent calls share one installation. Raises
        InstallError and leaves the previous installation in place.
        """

    @abstractmethod
    async def upgrade(self, progress: Progress) -> str:
        """Replace the software by the manifest's version and return what is installed.

        Does nothing if that version is installed. A running engine is running afterwards.
        """

    @abstractmethod
    async def init_env(self) -> None:
        """Create the directories and settings that `start` needs. Idempotent."""

    @abstractmethod
    async def version(self) -> str:
        """The version that the engine reports. Raises EngineNotInstalledError."""

    @abstractmethod
    def config(self) -> EngineConfig:
        """Where the engine is installed and which address it serves."""

    # Start, stop, health. Called for StartEngine, StopEngine, HealthCheck, and when the plugin exits.

    @abstractmethod
    async def start(self, mode: str) -> None:
        """Make the engine ready to serve; `mode` is auto, cpu, gpu or npu. Returns at once if it is ready.

        Concurrent callers share one start. Raises EngineNotInstalledError or EngineStartError.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Stop the engine and wait until no process of it is left. Aborts a start. Idempotent."""

    @abstractmethod
    async def health(self) -> Health:
        """Check the engine's health, within a few seconds."""

    async def aclose(self) -> None:
        """Stop, and release what `__init__` or any call acquired. The engine is not used afterwards."""
        await self.stop()

    # Models.

    @abstractmethod
    async def list_models(self) -> Sequence[ModelInfo]:
        """Every model that a call may name now."""

    @abstractmethod
    def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        """Pull a model and yield its events. Ends after Success; raises PullError or ModelNotFoundError.

        Closing the iterator early keeps the partial download for the next attempt.
        """

    @abstractmethod
    async def delete_model(self, name: str) -> None:
        """Delete a model from this machine. Raises ModelNotFoundError, ModelInUseError."""

    @abstractmethod
    async def load_model(self, name: str) -> None:
        """Load a model and wait until it can answer. Returns at once if it is loaded."""

    @abstractmethod
    async def unload_model(self, name: str) -> None:
        """Let running requests of a model end, then free its memory. Raises ModelNotLoadedError."""

    @abstractmethod
    async def running_models(self) -> Sequence[ModelInfo]:
        """The models in memory."""

    # Service calls, for InvokeService, InvokeServiceStream and InvokeServiceBidi.

    def validator(self, service: ServiceSpec) -> RequestValidator | None:
        """Return what checks a request of this service; None for a service without requests. Called by `Plugin`.

        An engine that speaks a second flavor of JSON, which `service.config_ref` names, returns a validator for it.
        """
        return VALIDATORS.get(service.service_name)

    @abstractmethod
    async def default_model(self, service: str) -> str:
        """The engine's choice for a call without a model, if neither the user nor plugin.yaml has a default;

        "" for none.
        """

    async def default_models(self, services: Iterable[str]) -> dict[str, str]:
        """The `default_model` of each service. For GetManifest; overridden where one look answers for all."""
        return {service: await self.default_model(service) for service in services}

    async def is_sample(self, name: str) -> bool:  # noqa: ARG002  # for engines with samples
        """Whether a name is that of a sample model, which a pulled model replaces as the default."""
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
        messages: AsyncIterator[ConversationMessage],  # noqa: ARG002  # for engines that converse
        default_model: str,  # noqa: ARG002
    ) -> AbstractAsyncContextManager[AsyncIterator[ConversationMessage]]:
        """Answer a conversation message by message; `messages` ends with the host's half-close.

        `default_model` is for a conversation that names no model. An error raised by `messages` is the host's.
        Leaving the context stops the engine's work. Engines without bidirectional services keep this default.
        """
        raise not_bidirectional(service)


def not_bidirectional(service: str) -> UnsupportedError:
    """The error of an engine without conversations, or without them for this service."""
    return UnsupportedError(f"service_name: {service} is not bidirectional with this engine; call InvokeService")


class UnknownEngineError(UnsupportedError):
    """No installed distribution provides the engine that plugin.yaml names. The text is `what` and then `fix`."""

    fix = "Correct engine.name in plugin.yaml, or install the Python package that provides this engine"

    def __init__(self, name: str, known: Iterable[str]) -> None:
        installed = ", ".join(sorted(known)) or "none"
        self.what = f"engine.name: no engine is called {name!r}; installed engines: {installed}"
        super().__init__(f"{self.what}. {self.fix}.")


def engine_class(name: str) -> type[Engine]:
    """The engine class that an installed distribution registered under `name`. Raises UnknownEngineError.

    An engine of this package cannot be replaced by another distribution's.
    """
    if ours := _own_engine(name):
        return ours
    from importlib.metadata import entry_points

    found = entry_points(group=_ENTRY_POINTS)
    for point in found:
        if point.name == name:
            loaded: type[Engine] = point.load()
            return loaded
    raise UnknownEngineError(name, [point.name for point in found])


def _own_engine(name: str) -> type[Engine] | None:
    """The only class that `engines/<name>/engine.py` exports, without a look at the metadata of all distributions."""
    package = f"{__package__}.{name}"
    spec = find_spec(package) if name.isidentifier() else None
    if spec is None or spec.submodule_search_locations is None or find_spec(f"{package}.engine") is None:
        return None
    module = import_module(f"{package}.engine")
    [exported] = module.__all__
    ours: type[Engine] = getattr(module, exported)
    return ours
