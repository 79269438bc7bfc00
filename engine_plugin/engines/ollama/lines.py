"""The JSON lines of Ollama's streams: what one line adds to an answer, and a whole stream collected into one answer.

chat has its texts in `message`, generate in `response`; the other fields are the same.
"""

from __future__ import annotations

import json
import reprlib
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama.errors import exception_for, has_error, line_complaint
from engine_plugin.errors import BadGatewayError
from engine_plugin.transport.answers import ANSWER_LIMIT, drained, one_line
from engine_plugin.transport.ndjson import line_objects, whole_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine_plugin.transport.http1 import HttpResponse

__all__ = [
    "NOT_DONE",
    "CollectedAnswer",
    "Delta",
    "collect",
    "delta_of",
    "finish_reason",
    "openai_call",
    "openai_logprobs",
    "to_json",
]

NOT_DONE = "the Ollama server's stream ended before it was done"

_REASONS = {"stop": "stop", "length": "length"}


@dataclass(slots=True)
class Delta:
    """What one line adds to an answer. `done` marks the last line."""

    content: str
    thinking: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False


@dataclass(slots=True)
class CollectedAnswer:
    """A whole answer: the texts of its lines, its tool calls, and the last line, which has the metrics."""

    content: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)


async def collect(service: str, response: HttpResponse, model: str) -> CollectedAnswer:
    """Read a stream to its last line. Called for unary calls: only a stream stops when its caller leaves.

    Raises the exception of an error line; BadGatewayError for a stream that ends early or exceeds 512 MiB.
    """
    answer = CollectedAnswer()
    size = 0
    async for lines in whole_lines(response):
        size += len(lines)
        if size > ANSWER_LIMIT:
            raise BadGatewayError(f"the engine's answer is longer than {ANSWER_LIMIT} bytes")
        for line in line_objects(lines):
            if has_error(line):
                raise exception_for(line_complaint(line), model)
            delta = delta_of(service, line)
            if delta.content:
                answer.content.append(delta.content)
            if delta.thinking:
                answer.thinking.append(delta.thinking)
            answer.calls += delta.calls
            answer.logprobs += delta.logprobs
            if delta.done:
                answer.last = line
                await drained(response)
                return answer
    raise BadGatewayError(NOT_DONE)


def delta_of(service: str, line: Mapping[str, Any]) -> Delta:
    """Parse one line. Raises BadGatewayError for a line that does not have Ollama's form."""
    source = line.get("message") if service == "chat" else line
    if source is None:
        source = {}
    if not isinstance(source, dict):
        raise _malformed(line)
    content = source.get("content" if service == "chat" else "response") or ""
    thinking = source.get("thinking") or ""
    calls, logprobs = source.get("tool_calls") or [], line.get("logprobs") or []
    if not (isinstance(content, str) and isinstance(thinking, str)):
        raise _malformed(line)
    for objects in (calls, logprobs):
        if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
            raise _malformed(line)
    return Delta(content, thinking, calls, logprobs, line.get("done") is True)


def _malformed(shape: Mapping[str, Any], what: str = "line") -> BadGatewayError:
    return BadGatewayError(f"the engine's {what} is not understood: {one_line(reprlib.repr(shape))}")


def to_json(shape: Any, separators: tuple[str, str] = (", ", ": ")) -> bytes:
    """Encode values of a server's answer. Raises BadGatewayError for values that JSON cannot hold, such as NaN."""
    try:
        text = json.dumps(shape, ensure_ascii=False, allow_nan=False, separators=separators)
    except (ValueError, RecursionError) as error:
        raise BadGatewayError(f"the engine's answer cannot be encoded as JSON: {error}") from None
    return text.encode("utf-8", "replace")


def finish_reason(last: Mapping[str, Any], *, called: bool) -> str:
    """OpenAI's finish_reason from an answer's last line; `called` says that the answer has tool calls."""
    reason = _REASONS.get(str(last.get("done_reason")), "stop")
    return "tool_calls" if called and reason == "stop" else reason


def openai_call(call: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A tool call in OpenAI's form: its arguments as JSON text, with a generated id where the server gives none.

    Raises BadGatewayError for a malformed call.
    """
    function = call.get("function")
    name = function.get("name") or "" if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise _malformed(call, "tool call")
    arguments, given = function.get("arguments"), call.get("id")
    if not isinstance(arguments, str):
        arguments = to_json({} if arguments is None else arguments).decode()
    return {
        "index": index,
        "id": given if isinstance(given, str) and given else f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def openai_logprobs(logprobs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """OpenAI's `logprobs`, in which every token has all fields; None without tokens."""
    if not logprobs:
        return None
    return {"content": [{"bytes": None, "top_logprobs": []} | token for token in logprobs]}
