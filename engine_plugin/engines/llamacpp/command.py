"""The settings of a llama.cpp server: JSON on stdin for the runner, arguments for a llama-server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_plugin.process import python

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine_plugin.install.software import Backend

__all__ = ["ServerSettings", "server_command", "server_environ"]

# Variables by which llama.cpp's server would override the settings.
_FOREIGN_VARIABLES = ("LLAMA_ARG_", "LLAMA_API_KEY", "LLAMA_LOG_", "AIP_MODE", "AIP_HTTP_PORT")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The settings of one model's server. The runner gets them as JSON by stdin, to keep the key out of argv and the
    environment. `host` is a socket path ending in .sock, or a loopback address with `port`
    (0: any). `pooling` is NONE, MEAN, CLS, LAST, RANK (for a reranker), or "" for the default of the model.
    """

    model: str
    alias: str
    kind: str
    pooling: str
    host: str
    port: int
    key: str
    context_length: int
    parallel: int
    threads: int
    gpu_layers: int


def server_command(backend: Backend, settings: ServerSettings, key_file: Path) -> list[str]:
    """argv of a llama-server behind the guard, which reads the key from `key_file`."""
    argv = python.guarded([backend.executable])
    argv += ["--model", settings.model, "--alias", settings.alias, "--api-key-file", str(key_file)]
    argv += ["--host", settings.host, "--port", str(settings.port), "--no-webui", "--offline"]
    argv += ["--ctx-size", str(settings.context_length), "--parallel", str(settings.parallel)]
    argv += ["--kv-unified", "--threads-http", "64", "--cache-ram", "0", "--slots", "--jinja"]
    argv += ["--no-prefill-assistant"]
    if settings.threads:
        argv += ["--threads", str(settings.threads)]
    if settings.gpu_layers >= 0:
        argv += ["--n-gpu-layers", str(settings.gpu_layers)]
    if settings.kind != "chat":
        whole = str(settings.context_length)
        argv += ["--embedding", "--batch-size", whole, "--ubatch-size", whole]
        if settings.pooling:
            argv += ["--pooling", settings.pooling.lower()]
    return argv


def server_environ(environ: Mapping[str, str], backend: Backend) -> dict[str, str]:
    """The environment of the server: `environ` without the settings of llama.cpp."""
    kept = {name: value for name, value in environ.items() if not name.startswith(_FOREIGN_VARIABLES)}
    kept["GGML_NO_BACKTRACE"] = "1"  # an abort must not fork a debugger
    return python.module_environ(kept, backend.site)
