"""How a llama.cpp server is told what to do: our runner by JSON on stdin, a llama-server by arguments."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from engine_plugin.engines.llamacpp.software import RUNNER
from engine_plugin.process import python

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine_plugin.engines.llamacpp.software import LlamaCppBackend

__all__ = ["ServerSettings", "runner_command", "runner_stdin", "server_command", "server_environ"]

# Variables that llama.cpp's server reads and that would change what we ask for.
_FOREIGN_VARIABLES = ("LLAMA_ARG_", "LLAMA_API_KEY", "LLAMA_LOG_", "AIP_MODE", "AIP_HTTP_PORT")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """One model's server. `host` is a socket path ending in .sock, or a loopback address with `port` (0: any).

    `pooling` is how an embedder pools (NONE, MEAN, CLS, LAST; RANK for a reranker), "" for the model's own.
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


def runner_command() -> list[str]:
    """argv of our runner; everything else goes by `runner_stdin`."""
    return python.module_command(RUNNER, "serve")


def runner_stdin(settings: ServerSettings) -> bytes:
    """The settings line. It holds the key, which therefore shows neither in argv nor in the environment."""
    return json.dumps(asdict(settings)).encode() + b"\n"


def server_command(backend: LlamaCppBackend, settings: ServerSettings, key_file: Path) -> list[str]:
    """argv of a llama-server behind the guard; the key is read from `key_file`."""
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


def server_environ(environ: Mapping[str, str], backend: LlamaCppBackend) -> dict[str, str]:
    """The environment of either server: `environ` without the variables that llama.cpp takes as settings."""
    kept = {name: value for name, value in environ.items() if not name.startswith(_FOREIGN_VARIABLES)}
    kept["GGML_NO_BACKTRACE"] = "1"  # an abort must not fork a debugger
    return python.module_environ(kept, backend.site)
