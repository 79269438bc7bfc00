"""The options of the engine for OpenAI-compatible servers, in plugin.yaml's `engine:` section."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine_plugin.engines.openai.address import BaseUrl
from engine_plugin.engines.options import number
from engine_plugin.models.capabilities import ModelOverride  # noqa: TC001  # read_options evaluates the hints
from engine_plugin.speech.options import AudioLimits, LiveOptions

__all__ = ["OpenAIOptions"]


@dataclass(frozen=True, slots=True)
class OpenAIOptions:
    """Each field is a key below `engine:`. Times are seconds; docs/openai.md explains each to a packager."""

    base_url: str = field(
        default="", metadata={"valid": BaseUrl.parse, "form": "a base URL such as http://127.0.0.1:8000/v1"}
    )
    """The server; empty: provider.engine_host, else the first that answers on a well-known port of this machine."""

    server: str = field(
        default="auto", metadata={"choices": ("auto", "vllm", "lmstudio", "llama-server", "ovo", "ovms", "other")}
    )
    """What kind of server it is; auto: it is asked."""

    key_variable: str = field(
        default="OPENAI_API_KEY",
        metadata={"pattern": r"[A-Za-z_][A-Za-z0-9_]*", "form": "the name of an environment variable"},
    )
    """The environment variable with the server's key."""

    send_key: str = field(default="auto", metadata={"choices": ("auto", "always", "never")})
    """Whether the server gets the key; auto: unless it is on this machine."""

    allow_plain_http: bool = False
    """Whether the key may go to another machine without TLS."""

    ca_file: str = ""
    """A PEM file of certificate authorities to trust beside the system's."""

    probe_timeout: float = number(1.5, 0.05, 60)
    """How long a server may take to say what it is. ENGINE_PLUGIN_PROBE_TIMEOUT wins over it."""

    connect_retries: int = number(3, 0, 20)
    """How often a connection that is refused is tried again; a request that was sent is never sent again."""

    connect_backoff: float = number(0.25, 0.01, 30)
    """How long to wait before the first of these attempts; each further wait is twice as long."""

    parallel: int = number(32, 1, 4096)
    """Requests that are given to the server at once; further ones wait here."""

    max_queue: int = number(256, 0, 100_000)
    """Requests that may wait before further ones are refused with 503."""

    voice: str = ""
    """The voice for speech when a request names none."""

    assemble: str = field(default="auto", metadata={"choices": ("auto", "always", "never")})
    """Whether whole answers are asked for as streams, so that a cancel reaches the server; auto: if it must be so."""

    models: tuple[ModelOverride, ...] = ()
    """What is known better of models than the server says."""

    live: LiveOptions = field(default_factory=LiveOptions)
    """How a live stream becomes sentences."""

    audio: AudioLimits = field(default_factory=AudioLimits)
    """How much sound is decoded, and how long that may take."""
