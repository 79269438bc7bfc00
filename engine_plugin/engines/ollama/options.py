"""The Ollama engine's options in plugin.yaml's `engine:` section."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine_plugin.engines.local.options import SoftwareOptions
from engine_plugin.engines.ollama.address import ServerAddress
from engine_plugin.engines.options import number
from engine_plugin.speech.options import AudioLimits, LiveOptions

__all__ = ["OllamaOptions"]

_DURATION = r"-1|0|(\d+(\.\d+)?(ns|us|ms|s|m|h))+"
_DURATION_FORM = "a duration such as 30s, 5m or 1h30m, 0, or -1 for ever"


def _duration() -> str:
    """A field for a time as Ollama writes it; "" leaves it to the server."""
    value: str = field(default="", metadata={"pattern": _DURATION, "form": _DURATION_FORM})
    return value


@dataclass(frozen=True, slots=True)
class OllamaOptions(SoftwareOptions):
    """Each field is a key below `engine:`. Times are seconds; docs/ollama.md explains each to a packager."""

    transport: str = field(default="auto", metadata={"choices": ("auto", "tcp")})
    """Ollama listens on TCP only: our own server has a loopback port."""

    # Which server

    server: str = field(default="auto", metadata={"choices": ("auto", "attach", "manage")})
    """auto: the one that answers at the address, else one of our own when its software is installed; attach: only
    the former; manage: only the latter."""

    address: str = field(
        default="",
        metadata={"valid": ServerAddress.parse, "form": "an address such as http://127.0.0.1:11434 or 192.168.1.5"},
    )
    """Where a server is to be found; empty: provider.engine_host, else OLLAMA_HOST, else 127.0.0.1:11434."""

    probe_timeout: float = number(1.5, 0.05, 60)
    """How long a server may take to say that it is there. ENGINE_PLUGIN_PROBE_TIMEOUT wins over it."""

    key_variable: str = "OLLAMA_API_KEY"
    """The environment variable with the key for a server on another machine; a server on this one gets none."""

    allow_plain_http: bool = False
    """Whether the key may go to another machine without https, where anybody on the way can read it."""

    minimum_version: str = field(
        default="0.5.0", metadata={"pattern": r"\d+(\.\d+)*", "form": "a version such as 0.9.0"}
    )
    """The oldest version of a server that is talked to."""

    # Requests

    keep_alive: str = _duration()
    """How long a model stays in memory after a request; empty: as the server has it."""

    context_length: int = number(0, 0, 10_000_000)
    """Tokens of context to ask for (num_ctx), never more than the model was made for; 0: as the server has it."""

    live: LiveOptions = field(default_factory=LiveOptions)
    """How what is spoken live is cut and told."""

    audio: AudioLimits = field(default_factory=AudioLimits)
    """What a recording may be, and how long it may take to decode."""

    # Our own server

    ollama: str = ""
    """Path of an ollama binary for our own server; empty: what is installed, else (server: manage) look on PATH."""

    accelerator: str = "auto"
    """What a release shall compute on: cpu, cuda, rocm, metal; auto takes what is certain to be here."""

    num_parallel: int = number(0, 0, 1024)
    """Requests that one model answers at once; 0: as Ollama decides."""

    max_loaded_models: int = number(0, 0, 1024)
    """How many models stay in memory; 0: as Ollama decides."""

    flash_attention: str = field(default="auto", metadata={"choices": ("auto", "on", "off")})
    """Whether to use flash attention; auto: as Ollama decides."""

    kv_cache_type: str = field(default="", metadata={"choices": ("", "f16", "q8_0", "q4_0")})
    """What the cache of keys and values is kept as; empty: f16."""

    load_timeout: str = _duration()
    """How long loading a model may show no progress; empty: as Ollama has it."""

    no_cloud: bool = True
    """Whether our own server has no cloud models: nothing that is asked leaves this machine."""
