"""The Ollama engine's options in plugin.yaml's `engine:` section."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from engine_plugin.engines.local.options import ServerOptions
from engine_plugin.engines.ollama.address import ServerAddress
from engine_plugin.engines.options import number
from engine_plugin.speech.options import AudioLimits, LiveOptions

__all__ = ["OllamaOptions", "keep_alive_value"]

_DURATION = r"-1|0|(\d+(\.\d+)?(ns|us|ms|s|m|h))+"
_DURATION_FORM = "a duration such as 30s, 5m or 1h30m, 0, or -1 for no limit"
_SECONDS = re.compile(r"-?[0-9]{1,18}")


def _duration() -> str:
    """A field for a duration in Ollama's notation; "" means the server's default."""
    value: str = field(default="", metadata={"pattern": _DURATION, "form": _DURATION_FORM})
    return value


@dataclass(frozen=True, slots=True)
class OllamaOptions(ServerOptions):
    """Each field is a key below `engine:`. Times are seconds; docs/ollama.md describes each option."""

    transport: str = field(default="auto", metadata={"choices": ("auto", "tcp")})
    """Ollama listens on TCP only: a managed server has a loopback port."""

    # Which server

    server: str = field(default="auto", metadata={"choices": ("auto", "attach", "manage")})
    """auto: the server that answers at the address, else a managed one if its software is installed; attach: only
    the former; manage: only the latter."""

    address: str = field(
        default="",
        metadata={"valid": ServerAddress.parse, "form": "an address such as http://127.0.0.1:11434 or 192.168.1.5"},
    )
    """The address of the server to attach to; empty: provider.engine_host, else OLLAMA_HOST, else 127.0.0.1:11434."""

    probe_timeout: float = number(1.5, 0.05, 60)
    """How long an attached server may take to answer a probe. ENGINE_PLUGIN_PROBE_TIMEOUT overrides it."""

    key_variable: str = "OLLAMA_API_KEY"
    """The environment variable with the key, which only servers on other machines receive."""

    allow_plain_http: bool = False
    """Whether the key may be sent to another machine over http, unencrypted."""

    minimum_version: str = field(
        default="0.5.0", metadata={"pattern": r"\d+(\.\d+)*", "form": "a version such as 0.9.0"}
    )
    """The oldest supported version of a server."""

    # Requests

    keep_alive: str = _duration()
    """How long a model stays in memory after a request; empty: the server's default."""

    context_length: int = number(0, 0, 10_000_000)
    """Tokens of context to request (num_ctx), at most the model's context length; 0: the server's default."""

    live: LiveOptions = field(default_factory=LiveOptions)
    """How live speech is divided and transcribed."""

    audio: AudioLimits = field(default_factory=AudioLimits)
    """The limits of recordings and their decoding."""

    # Managed server

    ollama: str = ""
    """Path of the ollama program to run; empty: the installed one, else with server: manage the one on PATH."""

    accelerator: str = "auto"
    """The device that the installed release must support: cpu, cuda, rocm or metal; auto detects it."""

    num_parallel: int = number(0, 0, 1024)
    """Requests that one model answers at once; 0: Ollama's default."""

    max_loaded_models: int = number(0, 0, 1024)
    """How many models stay in memory; 0: Ollama's default."""

    flash_attention: str = field(default="auto", metadata={"choices": ("auto", "on", "off")})
    """Whether to use flash attention; auto: Ollama decides."""

    kv_cache_type: str = field(default="", metadata={"choices": ("", "f16", "q8_0", "q4_0")})
    """The type of the KV cache; empty: f16."""

    load_timeout: str = _duration()
    """How long loading a model may show no progress; empty: Ollama's default."""

    no_cloud: bool = True
    """Whether a managed server refuses cloud models, so that no request leaves this machine."""


def keep_alive_value(value: Any) -> Any:
    """Make a text of digits a number of seconds, since the server requires a unit in texts."""
    return int(value) if isinstance(value, str) and _SECONDS.fullmatch(value) else value
