"""The options of the engine openai in plugin.yaml's `engine:` section."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine_plugin.engines.openai.adapters import ADAPTERS
from engine_plugin.engines.openai.address import BaseUrl
from engine_plugin.engines.options import number
from engine_plugin.models.capabilities import ModelOverride  # noqa: TC001  # read_options evaluates the hints
from engine_plugin.speech.options import AudioLimits, LiveOptions

__all__ = ["OpenAIOptions"]


@dataclass(frozen=True, slots=True)
class OpenAIOptions:
    """Each field is a key below `engine:`. Times are seconds. docs/openai.md documents them."""

    base_url: str = field(
        default="", metadata={"valid": BaseUrl.parse, "form": "a base URL such as http://127.0.0.1:8000/v1"}
    )
    """The base URL of the server; empty: provider.engine_host, else the first answer on a well-known local port."""

    server: str = field(default="auto", metadata={"choices": ("auto", *(adapter.name for adapter in ADAPTERS))})
    """The kind of server; auto: it is detected."""

    key_variable: str = field(
        default="OPENAI_API_KEY",
        metadata={"pattern": r"[A-Za-z_][A-Za-z0-9_]*", "form": "the name of an environment variable"},
    )
    """The environment variable with the server's key."""

    send_key: str = field(default="auto", metadata={"choices": ("auto", "always", "never")})
    """Whether the key is sent; auto: to servers on other machines."""

    allow_plain_http: bool = False
    """Whether the key may be sent to another machine without TLS."""

    ca_file: str = ""
    """A PEM file of certificate authorities to trust in addition to those of the system."""

    probe_timeout: float = number(1.5, 0.05, 60)
    """The timeout of requests that identify a server. ENGINE_PLUGIN_PROBE_TIMEOUT overrides it."""

    connect_retries: int = number(3, 0, 20)
    """How often a refused connection is retried. A request that was sent is never repeated."""

    connect_backoff: float = number(0.25, 0.01, 30)
    """The wait before the first retry; it doubles with each further one."""

    parallel: int = number(32, 1, 4096)
    """How many requests are sent to the server at the same time; further ones wait."""

    max_queue: int = number(256, 0, 100_000)
    """How many requests may wait; further ones are rejected with 503."""

    voice: str = ""
    """The voice for requests that name none."""

    assemble: str = field(default="auto", metadata={"choices": ("auto", "always", "never")})
    """Whether whole answers are requested as streams, so that a cancel reaches the server; auto: if necessary."""

    models: tuple[ModelOverride, ...] = ()
    """Properties of models that override those that the server reports."""

    live: LiveOptions = field(default_factory=LiveOptions)
    """How live streams are split into sentences."""

    audio: AudioLimits = field(default_factory=AudioLimits)
    """Limits of the audio of requests."""
