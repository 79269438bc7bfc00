"""Answers of engines over HTTP: their errors as this package's exceptions, and their streams up to `[DONE]`."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import (
    BadGatewayError,
    EngineDiedError,
    EnginePluginError,
    InvalidRequestError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.jsontext import REPLACEMENT
from engine_plugin.transport import sse
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from engine_plugin.process.run import ProcessRun
    from engine_plugin.transport.http1 import HttpResponse

__all__ = [
    "ANSWER_LIMIT",
    "ERROR_LIMIT",
    "Complaint",
    "drained",
    "explained",
    "one_line",
    "printable_text",
    "stream_events",
]

ANSWER_LIMIT = 512 * 1024 * 1024
"""The most bytes of an answer that are read."""

ERROR_LIMIT = 256 * 1024
"""The most bytes of an error's body that are read."""

_DEATH_NOTICE = 1.0
_LAST_BYTES = 0.5
_SHOWN = 500
_MAX_TEXT = 512
_HTML = re.compile(rb"\s*<(?:!doctype|html)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Complaint:
    """An error that an engine reported: the HTTP status (or the code inside a stream), its message, and its JSON.

    The JSON, `shape`, is the error object, or the object around an error that is a text.
    """

    status: int
    message: str
    shape: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """The message is shown in terminals and sent to hosts: one line of printable characters."""
        object.__setattr__(self, "message", one_line(self.message))

    @classmethod
    def of_body(cls, status: int, body: bytes) -> Complaint:
        """Parse an error answer: `{"error": {"message"}}`, `{"error": "…"}`, `{"detail": …}`, `{"message"}` or text.

        Of an error object only the message is shown, because some servers include a stack trace.
        """
        try:
            shape = json.loads(body)
        except (ValueError, RecursionError):
            shape = "" if _HTML.match(body) else body[:_SHOWN].decode("utf-8", "replace").strip()
        return cls._of_shape(status, shape)

    @classmethod
    def of_event(cls, block: bytes) -> Complaint:
        """Parse the error event at the start of `block`. Raises BadGatewayError for anything else."""
        event = next(iter(sse.event_data(block)), {})
        error = event.get("error")
        if not isinstance(error, str | dict):
            raise BadGatewayError(f"the engine reported an error inside its stream: {block[:300]!r}")
        code = error.get("code") if isinstance(error, dict) else None
        return cls._of_shape(code if isinstance(code, int) else 500, event)

    @classmethod
    def _of_shape(cls, status: int, shape: Any) -> Complaint:
        outer = shape if isinstance(shape, dict) else {}
        error = outer.get("error", shape)
        if isinstance(error, dict):
            words, outer = _words(error), error
        else:
            words = error if isinstance(error, str) else json.dumps(error)
        return cls(status, words[:_SHOWN] or _phrase(status), outer)

    def error(self) -> EnginePluginError:
        """The exception for this error."""
        if 400 <= self.status < 500 and self.status not in (401, 403, 404):
            return InvalidRequestError.at("request_data", f"the engine refuses it: {self.message}")
        if self.status == 501:
            return UnsupportedError(f"the engine does not support this: {self.message}")
        if self.status == 503:
            return UnavailableError(f"the engine has no room now: {self.message}")
        return BadGatewayError(f"the engine answered {self.status}: {self.message}", reason=self.message)


def _words(error: Mapping[str, Any]) -> str:
    """The message of an error object."""
    for name in ("message", "detail", "error"):
        value = error.get(name)
        if isinstance(value, list):  # FastAPI lists the invalid fields
            value = "; ".join(_field_words(item) for item in value[:5])
        if value:
            return str(value)
    kind = {name: error[name] for name in ("type", "code") if name in error}
    return json.dumps(kind) if kind else ""


def _field_words(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)[:_SHOWN]
    steps = item.get("loc")
    place = ".".join(str(step) for step in steps if step != "body") if isinstance(steps, list) else ""
    return f"{place}: {item.get('msg', 'is wrong')}" if place else str(item.get("msg", "is wrong"))


def _phrase(status: int) -> str:
    """The message for a status without a body."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"status {status}"


async def stream_events(
    response: HttpResponse,
    error_of: Callable[[Complaint], EnginePluginError] = Complaint.error,
    unwanted: bytes = b"",
    longest: int = 0,
) -> AsyncGenerator[bytes, None]:
    """Yield whole events as they arrive, up to `[DONE]`, except those that equal `unwanted`.

    An error event raises its exception after the events before it; an end without `[DONE]` raises BadGatewayError.
    What follows `[DONE]` is dropped.
    """
    async with aclosing(sse.whole_events(response, longest)) as blocks:
        async for arrived in blocks:
            block = arrived.replace(unwanted, b"") if unwanted else arrived
            if not block:
                continue
            error_at = sse.error_event(block)
            if error_at >= 0:
                if error_at:
                    yield block[:error_at]
                raise error_of(Complaint.of_event(block[error_at:]))
            done = sse.after_done(block)
            if done >= 0:
                yield block[:done]
                await drained(response)
                return
            yield block
    raise BadGatewayError("the engine's stream ended before it was done")


async def drained(response: HttpResponse) -> None:
    """Read the rest of an answer and drop it, so that its connection can be used again."""
    if response.complete:  # nearly always: the end arrives with the last bytes
        return
    with suppress(TimeoutError, BadGatewayError):
        async with asyncio.timeout(_LAST_BYTES):
            while await response.read_some():
                pass


def one_line(words: str) -> str:
    """Foreign text with unprintable characters replaced."""
    if words.isprintable():
        return words
    return " ".join("".join(char if char.isprintable() else " " for char in words).split())


def printable_text(value: object) -> str:
    """A printable text of at most 512 characters; "" for anything else. Used for fields of foreign answers."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT or REPLACEMENT in value:
        return ""
    return value if value.isprintable() else ""


async def explained(error: EnginePluginError, run: ProcessRun) -> EnginePluginError:
    """The error for a broken connection: the end of the process of `run`, if it has ended, else `error`."""
    if not await comes_true(run.over.wait(), within=_DEATH_NOTICE):
        return error
    if run.failure:
        return EngineDiedError(run.failure)
    return UnavailableError("the engine was stopped while it worked on this request")
