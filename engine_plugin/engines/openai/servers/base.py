"""What each kind of server tells of itself and its models, and what it must be asked differently."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from engine_plugin.jsontext import REPLACEMENT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine_plugin.engines.openai.address import BaseUrl
    from engine_plugin.models.info import Capabilities, Loaded

__all__ = ["Ask", "Found", "Glance", "Seen", "Server", "kind_by_name", "number_of", "text_of"]


_LONGEST = 512


class Ask(Protocol):
    """Asks the server a cheap question."""

    async def __call__(self, path: str, *, port: int = 0) -> Any:
        """The JSON that GET gives at a path below the server's root, or on another port of its host.

        None when it gives none: another status, another form, too slow, too long.
        """


@dataclass(frozen=True, slots=True)
class Found:
    """A model as its server tells of it; what it does not tell is empty, 0 or None."""

    name: str
    kind: str = ""
    """One of `models.info.KINDS`; "": to be guessed by the name."""
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
    def of(cls, entry: Mapping[str, Any], **known: Any) -> Found:
        """From an entry of the models' list."""
        owner = text_of(entry, "owned_by")
        extra = {"owned_by": owner} if owner else {}
        return cls(text_of(entry, "id"), created=number_of(entry, "created"), extra=extra, **known)

    @property
    def likely_kind(self) -> str:
        """What it is for, as the server says or by its name."""
        return self.kind or kind_by_name(self.name)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a server said of itself. `able` are the services that it has; None: it does not tell."""

    models: tuple[Found, ...]
    version: str = ""
    able: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Glance:
    """A server at first sight: its address, its list of models as it gave it, and the way to ask it more."""

    base: BaseUrl
    models: Sequence[Mapping[str, Any]]
    ask: Ask


class Server(ABC):
    """A kind of server. It has no state: what was seen is in `Seen`."""

    name: ClassVar[str] = "other"
    """As `engine.server` names it."""
    title: ClassVar[str] = "the server"
    start: ClassVar[str] = "start it as its maker says"
    """How a person starts one."""
    raw_scores: ClassVar[bool] = False
    """Whether rerank gives a classifier's logits in the place of probabilities."""
    hears_leaving: ClassVar[bool] = True
    """Whether it notices that its caller has gone where it does not stream."""
    noise: ClassVar[bytes] = b""
    """An event that it sends among the others and that says nothing."""
    form_fields: ClassVar[Mapping[str, str]] = {"response_format": "verbose_json"}
    """What a transcription's form says beside the request's fields."""
    reads_wav_only: ClassVar[bool] = False
    """Whether a recording must come as a WAV."""
    loads_when_asked: ClassVar[bool] = False
    """Whether a model comes into memory with the first request for it."""
    pulls: ClassVar[bool] = False
    """Whether it fetches models when it is told to."""
    ignores: ClassVar[frozenset[str]] = frozenset()
    """Fields of a completion that it takes and that change nothing."""
    no_limit: ClassVar[tuple[int | None, ...]] = ()
    """What `max_tokens` is for answers of any length; empty: it is left out."""

    def may_be(self, glance: Glance) -> bool:  # noqa: ARG002  # for kinds that can be told at first sight
        """Whether it is worth a question, by its models' list and its address."""
        return True

    @abstractmethod
    async def look(self, glance: Glance) -> Seen | None:
        """What it says of itself; None when it is another kind of server."""

    def adapt(self, service: str, body: dict[str, Any], *, stream: bool) -> bool:  # noqa: ARG002  # likewise
        """Change a request's body into one that this server understands; whether it is to be asked for a stream.

        Raises UnsupportedError for what it would silently do otherwise.
        """
        return stream


def text_of(entry: Mapping[str, Any], name: str) -> str:
    """A field's text; "" for everything else, and for what is too long, or no text that can be shown to anybody."""
    value = entry.get(name)
    if not isinstance(value, str) or len(value) > _LONGEST or REPLACEMENT in value:
        return ""
    return value if value.isprintable() else ""


def number_of(entry: Mapping[str, Any], name: str) -> int:
    """A field's number, whole and not negative; 0 for everything else."""
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
    """What a model is probably for, by its name alone; chat when nothing says otherwise."""
    plain = name.lower().rpartition("/")[2]
    return next((kind for kind, marks in _KINDS if any(mark in plain for mark in marks)), "chat")
