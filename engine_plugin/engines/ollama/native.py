"""Ollama's own JSON for hosts that use it (`config_ref: ollama:chat` and so on): validators of requests."""

from __future__ import annotations

from typing import Any, ClassVar

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services.base import RequestValidator, optional, require
from engine_plugin.services.pictures import check_pictures, listed, pictures_of

__all__ = ["NativeChat", "NativeEmbed", "NativeGenerate", "native_validator"]


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
