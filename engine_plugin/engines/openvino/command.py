"""How a server gets its settings: the embedded server by JSON on stdin, the OpenVINO Model Server by arguments."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from engine_plugin.engines.openvino.software import SERVER_MODULE, server_environ
from engine_plugin.process import python

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine_plugin.install.software import Backend

__all__ = ["ServerSettings", "environ_of", "ovms_command", "server_command", "settings_line"]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The settings of one run of a server. docs/openvino-server.md defines them; sizes in bytes, times in seconds.

    `host` is a socket's path ending in .sock, or a loopback address with `port` (0: any free one).
    """

    host: str
    port: int
    key: str
    config: str
    threads: int
    max_queue: int
    cache_dir: str
    memory_limit: int
    load_timeout: float
    start_timeout: float
    hung_timeout: float
    drain_timeout: float
    restart_limit: int
    restart_backoff: float
    stable_time: float


def server_command() -> list[str]:
    """argv of the embedded server, which reads everything else from `settings_line`."""
    return python.module_command(SERVER_MODULE, "serve")


def settings_line(settings: ServerSettings) -> bytes:
    """The embedded server's settings, for its stdin: the key in them is in neither argv nor the environment."""
    return json.dumps(asdict(settings)).encode() + b"\n"


def ovms_command(backend: Backend, settings: ServerSettings, key_file: Path, grpc_port: int) -> list[str]:
    """argv of an ovms behind the guard. It reads the key from `key_file`; nothing calls its gRPC port."""
    argv = python.guarded([backend.executable])
    argv += ["--rest_port", str(settings.port), "--rest_bind_address", settings.host]
    argv += ["--port", str(grpc_port), "--grpc_bind_address", "127.0.0.1"]
    # 0: read the configuration on request only, not periodically.
    argv += ["--config_path", settings.config, "--file_system_poll_wait_seconds", "0"]
    argv += ["--api_key_file", str(key_file)]
    if settings.cache_dir:
        argv += ["--cache_dir", settings.cache_dir]
    return argv


def environ_of(environ: Mapping[str, str], backend: Backend) -> dict[str, str]:
    """The environment of either server: `environ` with what the software needs."""
    if backend.kind == "ovms":
        return server_environ(backend, environ)
    return python.module_environ(environ, backend.site)
