"""What engines over HTTP answer: their complaints as our exceptions, and streams of events up to their proper end."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
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
from engine_plugin.transport import sse
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from engine_plugin.process.run import Life
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["ERROR_LIMIT", "Complaint", "drained", "explained", "one_line", "stream_events"]

ERROR_LIMIT = 256 * 1024
"""Bytes of an error's body that are read."""

_DEATH_NOTICE = 1.0
_LAST_BYTES = 0.5
_SHOWN = 500


@dataclass(frozen=True, slots=True)
class Complaint:
    """What an engine said was wrong: an HTTP status (or the code inside a stream), its words, and their JSON."""

    status: int
    message: str
    shape: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Its words end up in a person's terminal and on the wire: one line, and nothing that is no character."""
        object.__setattr__(self, "message", one_line(self.message))

    @classmethod
    def of_body(cls, status: int, body: bytes) -> Complaint:
        """From an error's answer: `{"error": {"message", …}}`, `{"error": "…"}`, or whatever it is."""
        try:
            return cls._of_error(status, json.loads(body)["error"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return cls(status, body[:_SHOWN].decode("utf-8", "replace").strip() or _phrase(status))

    @classmethod
    def of_event(cls, block: bytes) -> Complaint:
        """From a stream's error event, with which `block` begins. Raises BadGatewayError for anything else."""
        error = next(iter(sse.event_data(block)), {}).get("error")
        if isinstance(error, str):
            return cls(500, error)
        if not isinstance(error, dict):
            raise BadGatewayError(f"the engine reported an error inside its stream: {block[:300]!r}")
        code = error.get("code")
        return cls._of_error(code if isinstance(code, int) else 500, error)

    @classmethod
    def _of_error(cls, status: int, error: Any) -> Complaint:
        if not isinstance(error, dict):
            return cls(status, str(error))
        return cls(status, str(error.get("message") or json.dumps(error)), error)

    def error(self) -> EnginePluginError:
        """Our exception for it."""
        if 400 <= self.status < 500 and self.status not in (401, 403, 404):
            return InvalidRequestError.at("request_data", f"the engine refuses it: {self.message}")
        if self.status == 501:
            return UnsupportedError(f"the engine does not support this: {self.message}")
        if self.status == 503:
            return UnavailableError(f"the engine has no room now: {self.message}")
        return BadGatewayError(f"the engine answered {self.status}: {self.message}", reason=self.message)


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
    """Whole events as they come, up to `[DONE]`, without those that are exactly `unwanted`.

    An error event becomes an exception, after what came before it; an end without `[DONE]` a BadGatewayError.
    Whatever comes after `[DONE]` is nobody's.
    """
    async for arrived in sse.whole_events(response, longest):
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
    """Read an answer, of which all is known, to its end, so that its connection can be used again."""
    with suppress(TimeoutError, BadGatewayError):
        async with asyncio.timeout(_LAST_BYTES):
            while await response.read_some():
                pass


def one_line(words: str) -> str:
    """What somebody else said, without what is no character that can be shown."""
    if words.isprintable():
        return words
    return " ".join("".join(char if char.isprintable() else " " for char in words).split())


async def explained(error: EnginePluginError, life: Life) -> EnginePluginError:
    """Why a connection broke, when the reason is that the process of that life is gone."""
    if not await comes_true(life.over.wait(), within=_DEATH_NOTICE):
        return error
    if life.failure:
        return EngineDiedError(life.failure)
    return UnavailableError("the engine was stopped while it worked on this request")
