"""The base of adapters: requests that identify a server, what it reports, and how its API differs."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.engines.openai.requests import PATHS
from engine_plugin.errors import BadGatewayError, EnginePluginError, InvalidRequestError, UnavailableError
from engine_plugin.jsontext import JsonError, read_json
from engine_plugin.models.info import ModelCapabilities, ModelDescription, ModelInfo
from engine_plugin.system.files import LARGEST_JSON, in_thread
from engine_plugin.transport.answers import printable_text
from engine_plugin.transport.http1 import Http1Client

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping, Sequence

    from engine_plugin.engines.openai.address import BaseUrl
    from engine_plugin.models.info import Loaded

__all__ = ["Probe", "Reported", "ServerAdapter", "ServerInfo", "kind_by_name", "likely_kind"]

_LATEST = 253_402_300_799  # the last second of a datetime


class Reported(dict[str, Any]):
    """A JSON object of a server. A field that has another type than the expected one counts as missing."""

    @classmethod
    def of(cls, value: object) -> Reported:
        """The object `value`. Any other value, such as a list, becomes its field `data`, and None an empty object."""
        return cls(value if isinstance(value, dict) else {} if value is None else {"data": value})

    def text(self, name: str) -> str:
        """A text field; "" if it is missing, too long or unprintable."""
        return printable_text(self.get(name))

    def number(self, name: str) -> int:
        """A number field as a non-negative integer; 0 if it is missing or invalid."""
        value = self.get(name)
        return int(value) if isinstance(value, int | float) and value is not True and 0 < value < 1 << 62 else 0

    def object(self, name: str) -> Reported:
        """An object field; empty if it is missing."""
        value = self.get(name)
        return Reported(value if isinstance(value, dict) else {})

    def items_of(self, name: str) -> Sequence[Any]:
        """The items of a list field; none if it is missing."""
        value = self.get(name)
        return value if isinstance(value, list) else ()

    def objects_of(self, name: str) -> list[Reported]:
        """The objects in a list field; other items are ignored."""
        return [Reported(item) for item in self.items_of(name) if isinstance(item, dict)]

    def model(
        self,
        kind: str = "",
        size: int = 0,
        details: ModelDescription | None = None,
        capabilities: ModelCapabilities | None = None,
        loaded: Loaded | None = None,
    ) -> ModelInfo:
        """The model of this entry of a list of models, with what its server reports; `kind` is "" if unknown."""
        owner = self.text("owned_by")
        details = replace(details or ModelDescription(), extra={"owned_by": owner} if owner else {})
        made = datetime.fromtimestamp(min(self.number("created"), _LATEST), UTC)
        capabilities = capabilities or ModelCapabilities()
        return ModelInfo(self.text("id"), kind, size, "", made, False, details, capabilities, loaded)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server reports about itself. `services` is None if unknown.

    The `kind` of a model is "" if the server does not report it; its capabilities are those that the server reports.
    """

    models: Sequence[ModelInfo]
    version: str = ""
    services: frozenset[str] | None = None


class Probe:
    """A server to identify: its address, its list of models, and short requests. `close` it after use."""

    def __init__(self, base: BaseUrl, headers: Mapping[str, str], tls: ssl.SSLContext | None, timeout: float) -> None:
        """No I/O. `timeout` is that of a request, in seconds."""
        self.base = base
        self.headers = headers
        self.models: Sequence[Reported] = ()
        self._tls = tls if base.scheme == "https" else None
        self._timeout = timeout
        self._http = self.client()

    def client(self, port: int = 0, **options: Any) -> Http1Client:
        """A client for the server, or for another port of its host. The caller closes it."""
        return Http1Client((self.base.host, port or self.base.port), self.headers, tls=self._tls, **options)

    def is_owner(self, name: str) -> bool:
        """Whether a model in the list is `owned_by` this name, by which some kinds of servers are known."""
        return any(entry.text("owned_by") == name for entry in self.models)

    def close(self) -> None:
        """Close the idle connections."""
        self._http.close()

    async def get(self, path: str, http: Http1Client | None = None) -> tuple[int, bytes]:
        """The status and the body of a GET. Raises UnavailableError, also after the timeout."""
        try:
            async with asyncio.timeout(self._timeout), (http or self._http).request("GET", path) as response:
                return response.status, await response.read(LARGEST_JSON)
        except TimeoutError:
            raise UnavailableError(f"no answer within {self._timeout:g} s") from None
        except BadGatewayError as error:
            raise UnavailableError(str(error)) from error

    async def fetch(self, path: str, port: int = 0) -> Reported:
        """GET JSON from a path below the server's root, or from a path on another port of its host.

        Empty for another status than 200, for invalid or too long JSON, and after the timeout.
        """
        http = self.client(port) if port else self._http
        try:
            status, body = await self.get(path if port else self.base.prefix + path, http)
            return Reported.of(await in_thread(read_json, body, LARGEST_JSON) if status == 200 else None)
        except (EnginePluginError, JsonError):
            return Reported()
        finally:
            if port:
                http.close()

    async def services(self) -> frozenset[str] | None:
        """The services by the routes in the server's openapi.json, as FastAPI writes it; None without routes of its
        API."""
        routes = (await self.fetch("/openapi.json")).object("paths")
        found = {service for service, path in PATHS.items() if f"{self.base.version}{path}" in routes}
        if "speech-to-text" in found:
            found.add("speech-to-text-ws")
        return frozenset(found) or None


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
    holds_connections: ClassVar[bool] = False
    """Whether connections without a request cost it nothing: no thread waits for each. Some are opened ahead then."""
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

    def prepare(self, service: str, body: dict[str, Any], *, stream: bool) -> bool:
        """Adapt a request's body to this server; return whether to request a stream.

        Rejects fields of completions that the server would ignore, converts `max_tokens: -1` (no limit), and calls
        `adapt`.
        """
        for field in self.ignores if service == "generate" else ():
            if body.get(field):
                raise InvalidRequestError.at(field, f"{self.title} does not support it; leave it out")
        for field in ("max_tokens", "max_completion_tokens"):
            if body.get(field) == -1:
                del body[field]
                if self.unlimited_tokens:
                    body["max_tokens"] = self.unlimited_tokens[0]
        return self.adapt(service, body, stream=stream)

    def adapt(self, service: str, body: dict[str, Any], *, stream: bool) -> bool:  # noqa: ARG002  # for subclasses
        """Adapt it further, where this kind of server differs; return whether to request a stream.

        Raises UnsupportedError for requests that the server would silently answer in another way.
        """
        return stream


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


def likely_kind(model: ModelInfo) -> str:
    """The kind that the server reports, else a guess by the name."""
    return model.kind or kind_by_name(model.name)
