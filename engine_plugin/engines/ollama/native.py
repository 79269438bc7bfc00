"""Ollama's own JSON for a host that speaks it: lines framed as they are, and put together for a unary call."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama.errors import complains, complaint_error, complaint_of_line
from engine_plugin.engines.ollama.lines import NOT_DONE, json_of
from engine_plugin.errors import BadGatewayError
from engine_plugin.transport.answers import drained
from engine_plugin.transport.ndjson import as_events, read_line, whole_lines

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from engine_plugin.engines.ollama.gather import Whole
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["native_answer", "native_events"]

# In a JSON string a quote is escaped, so that these stand where a field is. `done` may also be inside of a tool's
# arguments, which is why its line is then read.
_ERROR_FIELD = re.compile(rb'"error"\s*:')
_DONE_FIELD = re.compile(rb'"done"\s*:\s*true')


async def native_events(response: HttpResponse, model: str) -> AsyncGenerator[bytes, None]:
    """The lines as events, up to that with `"done": true`.

    An error's line becomes an exception, after what came before it; so does a line that is no object. An end without
    done is a BadGatewayError.
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
            raise complaint_error(complaint_of_line(line), model)
    raise BadGatewayError(NOT_DONE)


def _first_bad(lines: bytes) -> int:
    """Where the first line begins that is an error or no object; the lines' length when none does."""
    if b'"error"' not in lines and lines.count(b"}\n") == lines.count(b"\n"):
        return len(lines)
    start = 0
    for line in lines.split(b"\n")[:-1]:
        if not line.endswith(b"}") or (_ERROR_FIELD.search(line) and complains(read_line(line))):
            break
        start += len(line) + 1
    return start


def _end_of_done(lines: bytes) -> int:
    """Where the line that says done ends; 0 when none does."""
    if b"true" not in lines:
        return 0  # as good as always, and seen much faster so
    for found in _DONE_FIELD.finditer(lines):
        start, end = lines.rfind(b"\n", 0, found.start()) + 1, lines.index(b"\n", found.end()) + 1
        if read_line(lines[start:end]).get("done") is True:
            return end
    return 0


def native_answer(service: str, whole: Whole) -> bytes:
    """The answer that the server gives when it does not stream: its last line with all texts in it."""
    answer = dict(whole.last)
    source: dict[str, Any] = answer
    if service == "chat":
        source = answer["message"] = {"role": "assistant"} | (answer.get("message") or {})
    source["content" if service == "chat" else "response"] = "".join(whole.said)
    if whole.thought:
        source["thinking"] = "".join(whole.thought)
    if whole.calls:
        source["tool_calls"] = whole.calls
    if whole.logprobs:
        answer["logprobs"] = whole.logprobs
    return json_of(answer)
