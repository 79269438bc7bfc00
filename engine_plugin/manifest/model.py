"""The validated content of a plugin.yaml."""

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
    "Manifest",
    "Platform",
    "Provider",
    "ServiceCapabilities",
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
"""The keys of `platforms`, as GOOS_GOARCH."""

_SYSTEMS = {"win32": "windows"}
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


def platform_key() -> str:
    """Return this machine's key in `platforms`, such as linux_amd64; not always one of PLATFORM_KEYS."""
    import platform  # takes 2 ms, and a hosted plugin does not need it

    machine = platform.machine().lower()
    return f"{_SYSTEMS.get(sys.platform, sys.platform)}_{_MACHINES.get(machine, machine)}"


@dataclass(frozen=True, slots=True)
class Provider:
    """The identity of the plugin. `type` is local or remote.

    `engine_host` is the engine's base URL: hosts show it, and engines that attach to a server use it as the address.
    """

    name: str
    display_name: str
    version: str
    type: str
    author: str
    description: str
    homepage: str
    engine_host: str


@dataclass(frozen=True, slots=True)
class ServiceCapabilities:
    """The ways to call a service other than unary."""

    support_streaming: bool
    support_bidirectional: bool


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """A declared service. `timeout` is in seconds; 0 is the default, a negative value means no deadline."""

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
    capabilities: ServiceCapabilities

    @property
    def native(self) -> bool:
        """Whether the service uses Ollama's own JSON instead of OpenAI's, as its config_ref declares."""
        return self.config_ref.partition(":")[0] == "ollama"


@dataclass(frozen=True, slots=True)
class Platform:
    """The program for one kind of machine; `executable` is relative to the plugin's directory."""

    executable: str
    dependencies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A validated plugin.yaml. Paths are absolute, variables expanded. Created by `load_manifest`."""

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
    """Whether a missing model is pulled before the call that names it."""

    def service(self, name: str) -> ServiceSpec:
        """Return a declared service. Raises ServiceNotFoundError. Called for each service call."""
        try:
            return self.services[name]
        except KeyError:
            declared = ", ".join(self.services)
            raise ServiceNotFoundError(
                f"{self.provider.name} has no service {name[:64]!r}; it declares: {declared}"
            ) from None

    def problem(self, path: KeyPath, what: str, fix: str, severity: str = "error") -> Problem:
        """Create a problem at the key `path`, such as `("engine", "threads")`, or its nearest existing parent.

        `what` names the key and what is wrong, `fix` the next step; neither ends in a full stop. Engines call it for
        their options and raise `ManifestError([problem, …])`.
        """
        return self.source.problem(path, what, fix, severity)

    def executable(self) -> Path:
        """Return the plugin's program for this machine. Called by a host before the launch.

        Raises ManifestError if it is undeclared, missing or not executable, or if another user could change it.
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
        """Return the manifest for GetManifest: the keys of plugin.yaml as JSON that a Go host can decode.

        For each service, `offered` has the models for a plugin.yaml that lists none, and `defaults` has the default
        model that replaces plugin.yaml's. The `engine` section is left out, because its options may be secret.
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
            "resources": dict(self.resources),
        }
        return json.dumps(body, allow_nan=False).encode()
