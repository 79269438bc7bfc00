"""The options that every engine on this machine has."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine_plugin.engines.options import number
from engine_plugin.install.options import Archive, SoftwareOptions  # noqa: F401  # read_options evaluates the hints
from engine_plugin.models.capabilities import ModelOverride  # noqa: TC001  # the same
from engine_plugin.process.limits import ProcessLimits

__all__ = ["ServerOptions"]


@dataclass(frozen=True, slots=True)
class ServerOptions(SoftwareOptions, ProcessLimits):
    """The options that every engine on this machine has in plugin.yaml's `engine:` section. Times are seconds."""

    transport: str = field(default="auto", metadata={"choices": ("auto", "unix", "tcp")})
    """The connection to the server: a private unix socket, or a loopback port and a key (auto: tcp on Windows)."""

    max_queue: int = number(256, 0, 100_000)
    """Requests that may wait for one model before further ones are refused with 503."""

    threads: int = number(0, 0, 1024)
    """Threads that compute; 0: the engine decides."""

    drain_timeout: float = number(30, 0, 86_400)
    """How long an unload waits for running requests before it ends them."""

    models: tuple[ModelOverride, ...] = ()
    """Corrections of what is detected of models; docs/models.md has the keys."""
