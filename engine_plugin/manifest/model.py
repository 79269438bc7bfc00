"""What a plugin.yaml says, after validation."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import ManifestError, Problem, ServiceNotFoundError
from engine_plugin.manifest.paths import is_file
from engine_plugin.system.programs import program_doubt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from engine_plugin.manifest.document import KeyPath, Source

__all__ = [
    "PLATFORM_KEYS",
    "SERVICE_NAMES",
    "Capabilities",
    "Manifest",
    "Platform",
    "Provider",
    "ServiceSpec",
    "platform_key",
]

SERVICE_NAMES = (
    "chat",
    "generate",
    "embed",
    "rerank",
    "text-to-image",
    "speech-to-text",
    "speech-to-text-ws",
    "text-to-speech",
)
"""The services that a plugin may declare."""

PLATFORM_KEYS = ("linux_amd64", "linux_arm64", "darwin_amd64", "darwin_arm64", "windows_amd64")
"""The machines that a host looks up in `platforms`, in Go's words: GOOS_GOARCH."""

_SYSTEMS = {"win32": "windows"}
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


def platform_key() -> str:
    """This machine's key in `platforms`, such as linux_amd64; not always one of PLATFORM_KEYS."""
    import platform  # 2 ms that a hosted plugin never needs

    machine = platform.machine().lower()
    return f"{_SYSTEMS.get(sys.platform, sys.platform)}_{_MACHINES.get(machine, machine)}"


@dataclass(frozen=True, slots=True)
class Provider:
    """Who the plugin is. `type` is local or remote. `engine_host` is the engine's base URL: hosts show it, and an
    engine of somebody else is looked for there."""

    name: str
    display_name: str
    version: str
    type: str
    author: str
    description: str
    homepage: str
    engine_host: str


@dataclass(frozen=True, slots=True)
class Capabilities:
    """How a service may be called besides unary."""

    support_streaming: bool
    support_bidirectional: bool


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One declared service. `timeout` is in seconds: 0 the host's default, negative none."""

    service_name: str
    task_type: str
    protocol: str
    expose_protocol: str
    endpoint: str
    auth_type: str
    auth_fields: tuple[str, ...]
    default_model: str
    support_models: tuple[str, ...]
    config_ref: str
    timeout: int
    capabilities: Capabilities

    @property
    def native(self) -> bool:
        """Whether a host speaks Ollama's own JSON with this service, in the place of OpenAI's: config_ref says so."""
        return self.config_ref.partition(":")[0] == "ollama"


@dataclass(frozen=True, slots=True)
class Platform:
    """What runs on one kind of machine; `executable` is relative to the plugin's directory."""

    executable: str
    dependencies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One validated plugin.yaml. Paths are absolute, variables expanded. Made by `load_manifest`."""

    path: Path
    plugin_dir: Path
    version: str
    provider: Provider
    services: Mapping[str, ServiceSpec]
    platforms: Mapping[str, Platform]
    data_dir: Path
    engine_name: str
    engine_options: Mapping[str, Any]
    resources: Mapping[str, Any]
    source: Source = field(repr=False, compare=False)
    auto_pull: bool = False
    """Whether a call that names a model which is not here has it pulled first."""

    def service(self, name: str) -> ServiceSpec:
        """The declared service of that name. Raises ServiceNotFoundError. Called for each service call."""
        try:
            return self.services[name]
        except KeyError:
            declared = ", ".join(self.services)
            raise ServiceNotFoundError(
                f"{self.provider.name} has no service {name[:64]!r}; it declares: {declared}"
            ) from None

    def problem(self, path: KeyPath, what: str, fix: str, severity: str = "error") -> Problem:
        """A complaint about the key at `path`, such as `("engine", "threads")`, or its nearest parent.

        `what` is a phrase that names the key, `fix` a phrase that says what to do; neither ends in a full stop.
        Called by engines for their options, who raise `ManifestError([problem, …])`.
        """
        return self.source.problem(path, what, fix, severity)

    def executable(self) -> Path:
        """The plugin's program for this machine. Called by a host before it launches it.

        Raises ManifestError when none is declared, it is absent, it cannot be executed, or another user could change
        it.
        """
        key = platform_key()
        platform = self.platforms.get(key)
        if platform is None:
            what = f"platforms has no entry for this machine, {key}"
            fix = f"Build the plugin for it and add {key}: with its executable"
            raise ManifestError([self.problem(("platforms",), what, fix)])
        path = self.plugin_dir / platform.executable
        place: KeyPath = ("platforms", key, "executable")
        if not is_file(path):
            what = f"platforms.{key}.executable does not exist: {path}"
            raise ManifestError([self.problem(place, what, "Build the plugin for this machine, or correct the path")])
        if doubt := program_doubt(path):
            what = f"platforms.{key}.executable cannot be run: {doubt.what}"
            raise ManifestError([self.problem(place, what, doubt.fix)])
        return path

    def to_json(
        self, offered: Mapping[str, Sequence[str]] | None = None, defaults: Mapping[str, str] | None = None
    ) -> bytes:
        """The manifest as GetManifest answers it: the keys of plugin.yaml in JSON that a Go host decodes.

        For each service `offered` has the models to name where plugin.yaml names none, and `defaults` the default
        model that counts in the place of plugin.yaml's. The `engine` section stays out: its options are between
        plugin.yaml and the engine, and may be secret.
        """
        import json

        services = [asdict(service) for service in self.services.values()]
        for service in services:
            name = service["service_name"]
            service["support_models"] = service["support_models"] or (offered or {}).get(name, ())
            service["default_model"] = (defaults or {}).get(name) or service["default_model"]
        body = {
            "version": self.version,
            "provider": asdict(self.provider),
            "services": services,
            "platforms": {key: asdict(platform) for key, platform in self.platforms.items()},
            "resources": {**self.resources, "data_dir": str(self.data_dir)},
        }
        return json.dumps(body, allow_nan=False).encode()
