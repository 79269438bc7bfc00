"""The llama.cpp engine's options in plugin.yaml's `engine:` section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine_plugin.engines.releases import Archive  # noqa: TC001  # read_options evaluates the hints

__all__ = ["LlamaCppOptions"]


def _number(default: Any, low: float, high: float) -> Any:
    return field(default=default, metadata={"min": low, "max": high})


@dataclass(frozen=True, slots=True)
class LlamaCppOptions:
    """Each field is a key below `engine:`. Times are seconds; docs/llamacpp.md explains each to a packager."""

    backend: str = field(default="auto", metadata={"choices": ("auto", "xllamacpp", "llama-server", "release")})
    """auto: `llama_server` when given or found on PATH, else what is installed; release: llama.cpp's own archives."""

    llama_server: str = ""
    """Path of a llama-server binary; empty: look on PATH."""

    version: str = ""
    """What InstallEngine and UpgradeEngine install: an xllamacpp version, or the tag of a release of llama.cpp.
    Empty: the one that goes with this version of engine-plugin."""

    accelerator: str = "auto"
    """What a release shall compute on: cpu, cuda, metal, rocm, vulkan; auto takes what is certain to be here."""

    archives: tuple[Archive, ...] = ()
    """A release of one's own in the place of llama.cpp's: what to install on which machine."""

    mirror: str = ""
    """Where llama.cpp's releases are copied to, as <mirror>/<tag>/<file>."""

    checksums: str = ""
    """URL or path of a file with the SHA-256 of a release's archives; empty: GitHub's, or the mirror's SHA256SUMS."""

    verify: bool = True
    """Whether an archive without a known SHA-256 is refused."""

    offline: bool = False
    """Never touch the network to install: everything is looked for in <data_dir>/software/offline."""

    transport: str = field(default="auto", metadata={"choices": ("auto", "unix", "tcp")})
    """How we reach the server: a private unix socket, or a loopback port and a key (auto: tcp on Windows only)."""

    max_loaded_models: int = _number(3, 1, 64)
    """How many models stay in memory; loading one more evicts the least recently used, after draining it."""

    parallel: int = _number(4, 1, 256)
    """Requests that one model answers at once; further ones wait in our queue."""

    max_queue: int = _number(256, 0, 100_000)
    """Requests that may wait for one model before further ones are refused with 503."""

    context_length: int = _number(8192, 128, 10_000_000)
    """Tokens of context, shared by a model's requests; never more than the model was made for."""

    threads: int = _number(0, 0, 1024)
    """Threads that compute; 0: llama.cpp decides."""

    gpu_layers: int = _number(-1, -1, 1000)
    """Layers put on a GPU in mode auto and gpu; -1: as many as fit."""

    start_timeout: float = _number(60, 1, 86_400)
    """How long a starting process may show no progress."""

    start_limit: float = _number(1800, 1, 86_400)
    """How long a start may take in all."""

    stop_timeout: float = _number(1.0, 0.05, 60)
    """How long a process may take to stop before it is killed."""

    restart_limit: int = _number(3, 0, 1000)
    """How often in a row a model's process that died is restarted without anybody asking for the model."""

    restart_backoff: float = _number(0.5, 0, 3600)
    """How long the first restart waits; each further one waits twice as long, at most 30 seconds."""

    stable_time: float = _number(60, 0, 86_400)
    """How long a process must have served for its death to count as a first one."""

    health_interval: float = _number(5, 0.05, 3600)
    """How often a loaded model's server is asked how it is."""

    health_failures: int = _number(3, 1, 1000)
    """How many answers in a row must be missing before it is called degraded; two in a row make it ready again."""

    hung_timeout: float = _number(120, 0, 86_400)
    """How long it may show no sign of life before it is killed and restarted; 0: for ever."""

    drain_timeout: float = _number(30, 0, 86_400)
    """How long an unload waits for running requests before it ends them."""
