"""Server-sent events: cut at event boundaries, parsed as little as possible."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import BadGatewayError
from engine_plugin.jsontext import answer_object, json_object, write_json

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping

    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["DONE", "after_done", "error_event", "event_data", "event_of", "whole_events"]

DONE = b"data: [DONE]\n\n"
"""The event that ends a stream."""

# Lines may end in LF, CRLF or CR.
_EMPTY_LINES = (b"\n\n", b"\n\r\n", b"\r\r")
_MAX_EVENT = 16 * 1024 * 1024
# JSON escapes line ends and quotes inside strings, so these bytes occur only at the start of a line.
_OBJECT = re.compile(rb"(?:\A|[\r\n])(data|error): ?(\{[^\r\n]*)")
_DONE_LINE = re.compile(rb"(?:\A|[\r\n])data: ?\[DONE\](?=[\r\n])")
_DONE_ALONE = re.compile(rb"data: ?\[DONE\]")
_ERROR_MARKS = (b'"error"', b"error: {", b"error:{")
_NO_ERROR = (None, False, "")


async def whole_events(response: HttpResponse, longest: int = 0) -> AsyncGenerator[bytes, None]:
    """Yield the body in blocks that end where an event ends: all events that have arrived together.

    An event of more than `longest` bytes (0: 16 MiB), and a body that ends inside one, raise BadGatewayError.
    """
    longest = longest or _MAX_EVENT
    parts: list[bytes] = []  # of an event whose end has not arrived
    size, tail = 0, b""  # of them; an empty line may begin with their last bytes
    while block := await response.read_some():
        cut = max(0, _last_boundary(tail + block) - len(tail))
        if cut:
            yield b"".join((*parts, block[:cut]))
            parts, size, tail = [], 0, b""
        if rest := block[cut:]:
            parts.append(rest)
            size, tail = size + len(rest), (tail + rest[-2:])[-2:]
            if size > longest:
                raise BadGatewayError(f"the engine sent an event of over {longest} bytes")
    rest = b"".join(parts)
    if _DONE_ALONE.fullmatch(rest.strip()):
        yield rest.strip() + b"\n\n"  # complete, but for the empty line
    elif rest.strip():
        raise BadGatewayError("the engine's stream ended inside an event")


def _last_boundary(data: bytes) -> int:
    """The index after the last empty line that ends an event, 0 if there is none."""
    if data.endswith(b"\n\n"):
        return len(data)
    marks = _EMPTY_LINES if b"\r" in data else _EMPTY_LINES[:1]
    return max([at + len(mark) for mark in marks if (at := data.rfind(mark)) >= 0], default=0)


def error_event(block: bytes) -> int:
    """The index at which an error event begins in a block of whole events; -1 if there is none."""
    if b"error" not in block or not any(mark in block for mark in _ERROR_MARKS):
        return -1
    for line in _OBJECT.finditer(block):
        if line[1] == b"error" or (b'"error"' in line[2] and _tells_error(line[2])):
            return _last_boundary(block[: line.start() + 1])  # the event may begin before this line
    return -1


def _tells_error(data: bytes) -> bool:
    shape = json_object(data)
    return data.startswith(b'{"error"') if shape is None else shape.get("error") not in _NO_ERROR


def after_done(block: bytes) -> int:
    """The index after the first `[DONE]` event in a block of whole events; -1 if there is none."""
    found = _DONE_LINE.search(block) if b"[DONE]" in block else None
    if found is None:
        return -1
    ends = [at + len(mark) for mark in _EMPTY_LINES if (at := block.find(mark, found.end())) >= 0]
    return min(ends, default=len(block))


def event_of(shape: Mapping[str, Any]) -> bytes:
    """An event with a JSON object."""
    return b"data: " + write_json(shape) + b"\n\n"


def event_data(block: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a block of whole events, without comments and [DONE].

    Raises BadGatewayError for data that is not a JSON object.
    """
    for line in block.splitlines():
        name, colon, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not colon or name not in (b"data", b"error") or value == b"[DONE]":
            continue
        shape = answer_object(value, "the engine's event")
        yield {"error": shape} if name == b"error" else shape
