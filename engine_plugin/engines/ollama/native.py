"""Ollama's own JSON for hosts that use it (`config_ref: ollama:chat` and so on): requests and streams."""

from __future__ import annotations

from typing import Any, ClassVar

from engine_plugin.engines.ollama.errors import checked_line
from engine_plugin.errors import EnginePluginError, InvalidRequestError
from engine_plugin.services.base import RequestValidator, optional, require
from engine_plugin.services.pictures import check_pictures, listed, pictures_of
from engine_plugin.transport.ndjson import as_events, read_line

__all__ = ["NativeChat", "NativeEmbed", "NativeGenerate", "NativeWriter", "native_validator"]


def _check_common(request: dict[str, Any]) -> None:
    optional(request, "options", dict)
    keep_alive = request.get("keep_alive")
    if isinstance(keep_alive, bool) or not isinstance(keep_alive, str | int | float | None):
        raise InvalidRequestError.at("keep_alive", 'must be a duration such as "5m", or a number of seconds')
    optional(request, "format", str, dict)


class NativeChat(RequestValidator):
    """Validates requests of /api/chat. One without messages only loads the model."""

    name: ClassVar[str] = "chat"
    nested: ClassVar[frozenset[str]] = frozenset({"messages", "tools", "options"})

    def check(self, request: dict[str, Any]) -> None:
        messages = optional(request, "messages", list) or []
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise InvalidRequestError.at(f"messages[{index}]", "must be an object with a role and content")
        check_pictures(pictures_of(messages))
        optional(request, "tools", list)
        optional(request, "think", bool, str)
        _check_common(request)


class NativeGenerate(RequestValidator):
    """Validates requests of /api/generate. One without a prompt only loads the model."""

    name: ClassVar[str] = "generate"
    nested: ClassVar[frozenset[str]] = frozenset({"options"})

    def check(self, request: dict[str, Any]) -> None:
        for field in ("prompt", "suffix", "system", "template"):
            optional(request, field, str)
        for field in ("images", "context"):
            optional(request, field, list)
        check_pictures(listed(request.get("images"), "images"))
        optional(request, "raw", bool)
        optional(request, "think", bool, str)
        _check_common(request)


class NativeEmbed(RequestValidator):
    """Validates requests of /api/embed: `input` is a text or a list of texts."""

    name: ClassVar[str] = "embed"
    nested: ClassVar[frozenset[str]] = frozenset({"options"})

    def check(self, request: dict[str, Any]) -> None:
        texts = require(request, "input", str, list)
        for index, text in enumerate(texts if isinstance(texts, list) else ()):
            if not isinstance(text, str):
                raise InvalidRequestError.at(f"input[{index}]", "must be a string")
        optional(request, "dimensions", int)
        optional(request, "truncate", bool)
        _check_common(request)

    def trivial_answer(self, request: dict[str, Any]) -> dict[str, Any] | None:
        return {"model": request["model"], "embeddings": []} if request["input"] == [] else None


_VALIDATORS: dict[str, RequestValidator] = {
    validator.name: validator for validator in (NativeChat(), NativeGenerate(), NativeEmbed())
}


def native_validator(service: str) -> RequestValidator | None:
    """The validator of Ollama's own requests for a service; None for a service without them."""
    return _VALIDATORS.get(service)


class NativeWriter:
    """Writes the events of a native stream: the lines unchanged. `model` is the server's name of the model."""

    def __init__(self, model: str) -> None:
        self.last: dict[str, Any] = {}
        """The last line, with `done: true`; {} before it arrives."""
        self.failure: EnginePluginError | None = None
        """The error that follows the events written so far."""
        self._model = model

    def write(self, lines: bytes) -> bytes:
        """Convert a block of whole lines to events, up to the last line or the first error.

        An error is an error line, or a line that is not a JSON object.
        """
        # Quotes inside JSON strings are escaped, so that `"error"` is a field. Tool arguments may have a `done`.
        if b"true" not in lines and b'"error"' not in lines and lines.count(b"}\n") == lines.count(b"\n"):
            return as_events(lines)  # nearly always
        end = 0
        try:
            for line in lines.split(b"\n")[:-1]:
                shape = checked_line(read_line(line), self._model)
                end += len(line) + 1
                if shape.get("done") is True:
                    self.last = shape
                    break
        except EnginePluginError as error:
            self.failure = error
        return as_events(lines[:end]) if end else b""
