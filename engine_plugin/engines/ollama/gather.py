"""All of a stream, for an answer in one piece."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama.errors import complains, complaint_error, complaint_of_line
from engine_plugin.engines.ollama.lines import NOT_DONE, piece_of
from engine_plugin.errors import BadGatewayError
from engine_plugin.transport.answers import drained
from engine_plugin.transport.ndjson import line_objects, whole_lines

if TYPE_CHECKING:
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["Whole", "gathered"]

_ANSWER_LIMIT = 512 * 1024 * 1024


@dataclass(slots=True)
class Whole:
    """What was said, thought and called, piece by piece, and the last line, which has the metrics."""

    said: list[str] = field(default_factory=list)
    thought: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)


async def gathered(service: str, response: HttpResponse, model: str) -> Whole:
    """A stream's lines up to that with done. Raises what an error's line means; BadGatewayError without done."""
    whole = Whole()
    size = 0
    async for lines in whole_lines(response):
        size += len(lines)
        if size > _ANSWER_LIMIT:
            raise BadGatewayError(f"the engine's answer is longer than {_ANSWER_LIMIT} bytes")
        for line in line_objects(lines):
            if complains(line):
                raise complaint_error(complaint_of_line(line), model)
            piece = piece_of(service, line)
            if piece.said:
                whole.said.append(piece.said)
            if piece.thought:
                whole.thought.append(piece.thought)
            whole.calls += piece.calls
            whole.logprobs += piece.logprobs
            if piece.done:
                whole.last = line
                await drained(response)
                return whole
    raise BadGatewayError(NOT_DONE)
