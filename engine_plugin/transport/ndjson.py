"""JSON lines (NDJSON): cut at line ends, parsed as little as possible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_plugin.errors import BadGatewayError
from engine_plugin.jsontext import answer_object, json_object

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["EVENT_ADDS", "as_events", "line_objects", "read_line", "split_lines", "whole_lines"]

EVENT_ADDS = len(b"data: \n")
_MAX_LINE = 16 * 1024 * 1024
_SHOWN = 120


async def whole_lines(response: HttpResponse, longest: int = 0) -> AsyncGenerator[bytes, None]:
    """Yield the body in blocks of whole lines, which may be empty: all lines that have arrived together.

    Each line ends in LF. A last line without LF counts if it is a JSON object. A line of over `longest` bytes (0: 16
    MiB), and a body that ends inside one, raise BadGatewayError.
    """
    longest = longest or _MAX_LINE
    parts: list[bytes] = []  # of a line whose end has not arrived
    size = 0
    while block := await response.read_some():
        cut = block.rfind(b"\n") + 1
        if cut:
            yield b"".join([*parts, block[:cut]]) if parts else block[:cut]
            parts, size = [], 0
        if cut < len(block):
            parts.append(block[cut:])
            size += len(block) - cut
            if size > longest:
                raise BadGatewayError(f"the engine sent a line of over {longest} bytes")
    if rest := b"".join(parts).strip():
        if json_object(rest) is None:
            raise BadGatewayError("the engine's stream ended inside a line")
        yield rest + b"\n"


def split_lines(block: bytes) -> Iterator[bytes]:
    """The lines of a block that are not empty, without line ends and other CR.

    Within a line CR is white space in JSON, but would end the line of an event.
    """
    for line in block.split(b"\n"):
        if stripped := line.strip():
            yield stripped.replace(b"\r", b" ")


def as_events(lines: bytes) -> bytes:
    """A block of whole lines without CR and empty lines as server-sent events; the JSON is unchanged.

    An event is EVENT_ADDS bytes longer than its line.
    """
    return b"".join((b"data: ", lines[:-1].replace(b"\n", b"\n\ndata: "), b"\n\n"))


def line_objects(lines: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a block of whole lines. Raises BadGatewayError for anything else."""
    return map(read_line, split_lines(lines))


def read_line(line: bytes) -> dict[str, Any]:
    """The JSON object of one line. Raises BadGatewayError for anything else."""
    return answer_object(line, "the engine's line")
