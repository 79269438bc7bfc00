"""The base of adapters: what a kind of server reports about itself and its models, and how its API differs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from engine_plugin.transport.answers import printable_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine_plugin.engines.openai.address import BaseUrl
    from engine_plugin.models.info import Capabilities, Loaded

__all__ = [
    "FetchJson",
    "Probe",
    "ServerAdapter",
    "ServerInfo",
    "ServerModel",
    "kind_by_name",
    "number_of",
    "text_of",
]


class FetchJson(Protocol):
    """Fetches JSON from the server."""

    async def __call__(self, path: str, *, port: int = 0) -> Any:
        """GET a path below the server's root, or on another port of its host.

        None for another status than 200, for invalid or too long JSON, and after a timeout.
        """


@dataclass(frozen=True, slots=True)
class ServerModel:
    """A model as its server reports it; unknown fields are empty, 0 or None."""

    name: str
    kind: str = ""
    """One of `models.info.KINDS`; "" if unknown."""
    created: float = 0.0
    size: int = 0
    format: str = ""
    family: str = ""
    parameter_size: str = ""
    quantization: str = ""
    engine: Capabilities | None = None
    loaded: Loaded | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: Mapping[str, Any], **known: Any) -> ServerModel:
        """Create it from an entry of the list of models."""
        owner = text_of(entry, "owned_by")
        extra = {"owned_by": owner} if owner else {}
        return cls(text_of(entry, "id"), created=number_of(entry, "created"), extra=extra, **known)

    @property
    def likely_kind(self) -> str:
        """The kind that the server reports, else a guess by the name."""
        return self.kind or kind_by_name(self.name)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server reports about itself. `services` is None if unknown."""

    models: tuple[ServerModel, ...]
    version: str = ""
    services: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """A server to identify: its address, its list of models, and a function for further requests."""

    base: BaseUrl
    models: Sequence[Mapping[str, Any]]
    fetch_json: FetchJson


class ServerAdapter(ABC):
    """Describes one kind of server. Stateless: `ServerInfo` has what a server reported."""

    name: ClassVar[str] = "other"
    """The value of `engine.server`."""
    title: ClassVar[str] = "the server"
    start: ClassVar[str] = "see its documentation"
    """How a user starts it."""
    raw_scores: ClassVar[bool] = False
    """Whether rerank returns logits instead of probabilities."""
    detects_disconnect: ClassVar[bool] = True
    """Whether it detects a disconnected caller while it does not stream."""
    ignored_event: ClassVar[bytes] = b""
    """An event without content that is dropped."""
    form_fields: ClassVar[Mapping[str, str]] = {"response_format": "verbose_json"}
    """Additional fields of a transcription form."""
    reads_wav_only: ClassVar[bool] = False
    """Whether recordings must be WAV files."""
    loads_on_demand: ClassVar[bool] = False
    """Whether the first request for a model loads it."""
    pulls: ClassVar[bool] = False
    """Whether it can pull models."""
    ignores: ClassVar[frozenset[str]] = frozenset()
    """Fields of a completion that it ignores."""
    unlimited_tokens: ClassVar[tuple[int | None, ...]] = ()
    """The value of `max_tokens` for unlimited answers; empty: omit the field."""

    def matches(self, probe: Probe) -> bool:  # noqa: ARG002  # for subclasses
        """Whether the address and the list of models match this kind, so that `inspect` is worthwhile."""
        return True

    @abstractmethod
    async def inspect(self, probe: Probe) -> ServerInfo | None:
        """Query the server; None if it is another kind of server."""

    def adapt(self, service: str, body: dict[str, Any], *, stream: bool) -> bool:  # noqa: ARG002  # for subclasses
        """Adapt a request's body to this server; return whether to request a stream.

        Raises UnsupportedError for requests that the server would silently answer in another way.
        """
        return stream


def text_of(entry: Mapping[str, Any], name: str) -> str:
    """A text field; "" if it is missing, too long or unprintable."""
    return printable_text(entry.get(name))


def number_of(entry: Mapping[str, Any], name: str) -> int:
    """A number field as a non-negative integer; 0 if it is missing or invalid."""
    value = entry.get(name)
    return int(value) if isinstance(value, int | float) and value is not True and 0 < value < 1 << 62 else 0


_KINDS = (
    ("rerank", ("rerank",)),
    ("embed", ("embed", "bge-", "e5-", "gte-", "minilm")),
    ("speech-to-text", ("whisper", "transcribe", "parakeet", "-asr", "asr-")),
    ("text-to-speech", ("tts", "speak", "speech", "kokoro", "piper", "bark")),
    ("text-to-image", ("stable-diffusion", "sdxl", "flux", "dall-e", "-image", "image-")),
)


def kind_by_name(name: str) -> str:
    """Guess the kind of a model by its name; chat by default."""
    plain = name.lower().rpartition("/")[2]
    return next((kind for kind, marks in _KINDS if any(mark in plain for mark in marks)), "chat")
