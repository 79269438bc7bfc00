"""Ollama's own JSON for hosts that use it (`config_ref: ollama:chat` and so on): validators of requests, answers.

The lines of a stream pass through unchanged, framed as events.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.engines.ollama.errors import exception_for, has_error, line_complaint
from engine_plugin.engines.ollama.lines import NOT_DONE, to_json
from engine_plugin.errors import BadGatewayError, InvalidRequestError
from engine_plugin.services.base import RequestValidator, optional, require
from engine_plugin.services.pictures import check_pictures, listed, pictures_of
from engine_plugin.transport.answers import drained
from engine_plugin.transport.ndjson import as_events, read_line, whole_lines

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from engine_plugin.engines.ollama.lines import CollectedAnswer
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["NativeChat", "NativeEmbed", "NativeGenerate", "native_answer", "native_events", "native_validator"]

# Quotes inside JSON strings are escaped, so these match fields only. Tool arguments may have a field `done`, too, so
# a line that matches is parsed.
_ERROR_FIELD = re.compile(rb'"error"\s*:')
_DONE_FIELD = re.compile(rb'"done"\s*:\s*true')


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


async def native_events(response: HttpResponse, model: str) -> AsyncGenerator[bytes, None]:
    """Yield the lines as events, up to the line with `"done": true`.

    An error line, or one that is not a JSON object, raises its exception after the events before it; a stream that
    ends early raises BadGatewayError.
    """
    async for lines in whole_lines(response):
        good = lines[: _first_bad(lines)]
        end = _end_of_done(good)
        if end:
            yield as_events(good[:end])
            await drained(response)
            return
        if good:
            yield as_events(good)
        if len(good) < len(lines):
            line = read_line(lines[len(good) :].partition(b"\n")[0])
            raise exception_for(line_complaint(line), model)
    raise BadGatewayError(NOT_DONE)


def _first_bad(lines: bytes) -> int:
    """The start of the first line that is an error or not an object; the length of `lines` if there is none."""
    if b'"error"' not in lines and lines.count(b"}\n") == lines.count(b"\n"):
        return len(lines)
    start = 0
    for line in lines.split(b"\n")[:-1]:
        if not line.endswith(b"}") or (_ERROR_FIELD.search(line) and has_error(read_line(line))):
            break
        start += len(line) + 1
    return start


def _end_of_done(lines: bytes) -> int:
    """The end of the line with `"done": true`; 0 if there is none."""
    if b"true" not in lines:
        return 0  # nearly always, and much cheaper than the regular expression
    for found in _DONE_FIELD.finditer(lines):
        start, end = lines.rfind(b"\n", 0, found.start()) + 1, lines.index(b"\n", found.end()) + 1
        if read_line(lines[start:end]).get("done") is True:
            return end
    return 0


def native_answer(service: str, collected: CollectedAnswer) -> bytes:
    """The answer that the server would give without streaming: the last line with the texts of all lines."""
    answer = dict(collected.last)
    source: dict[str, Any] = answer
    if service == "chat":
        source = answer["message"] = {"role": "assistant"} | (answer.get("message") or {})
    source["content" if service == "chat" else "response"] = "".join(collected.content)
    if thinking := "".join(collected.thinking):
        source["thinking"] = thinking
    if collected.calls:
        source["tool_calls"] = collected.calls
    if collected.logprobs:
        answer["logprobs"] = collected.logprobs
    return to_json(answer)
