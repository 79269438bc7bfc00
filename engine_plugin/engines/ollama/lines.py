"""The JSON lines of Ollama's streams: what one line adds to an answer, and the whole answer of all lines.

chat has its texts in `message`, generate in `response`; the other fields are the same.
"""

from __future__ import annotations

import json
import reprlib
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama.errors import checked_line
from engine_plugin.errors import BadGatewayError
from engine_plugin.transport.answers import ANSWER_LIMIT, drained, one_line
from engine_plugin.transport.ndjson import line_objects, whole_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine_plugin.transport.http1 import HttpResponse

__all__ = [
    "NOT_DONE",
    "Delta",
    "collect",
    "delta_of",
    "finish_reason",
    "openai_call",
    "openai_logprobs",
    "to_json",
    "whole_answer",
]

NOT_DONE = "the Ollama server's stream ended before it was done"

_TEXT_FIELDS = {"chat": "content", "generate": "response"}


@dataclass(slots=True)
class Delta:
    """What one line adds to an answer. `done` marks the last line."""

    content: str
    thinking: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False


async def collect(service: str, response: HttpResponse, model: str) -> dict[str, Any]:
    """Read a stream into one answer. Called for unary calls: only a stream stops when its caller leaves.

    Raises the exception of an error line; BadGatewayError for a stream that ends early or exceeds 512 MiB.
    """
    deltas: list[Delta] = []
    size = 0
    async for lines in whole_lines(response):
        size += len(lines)
        if size > ANSWER_LIMIT:
            raise BadGatewayError(f"the engine's answer is longer than {ANSWER_LIMIT} bytes")
        for line in line_objects(lines):
            deltas.append(delta_of(service, checked_line(line, model)))
            if deltas[-1].done:
                await drained(response)
                return whole_answer(service, line, deltas)
    raise BadGatewayError(NOT_DONE)


def whole_answer(service: str, last: Mapping[str, Any], deltas: Sequence[Delta]) -> dict[str, Any]:
    """The answer that the server would give without streaming: the last line with what all lines add."""
    answer = dict(last)
    source = answer
    if service == "chat":
        source = answer["message"] = {"role": "assistant"} | (answer.get("message") or {})
    source[_TEXT_FIELDS[service]] = "".join(delta.content for delta in deltas)
    if thinking := "".join(delta.thinking for delta in deltas):
        source["thinking"] = thinking
    if calls := [call for delta in deltas for call in delta.calls]:
        source["tool_calls"] = calls
    if logprobs := [token for delta in deltas for token in delta.logprobs]:
        answer["logprobs"] = logprobs
    return answer


def delta_of(service: str, line: Mapping[str, Any]) -> Delta:
    """Parse one line. Raises BadGatewayError for a line that does not have Ollama's form."""
    source = line.get("message") if service == "chat" else line
    if source is None:
        source = {}
    if not isinstance(source, dict):
        raise _malformed(line)
    content = source.get(_TEXT_FIELDS[service]) or ""
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
    if last.get("done_reason") == "length":
        return "length"
    return "tool_calls" if called else "stop"


def openai_call(call: Mapping[str, Any]) -> dict[str, Any]:
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
        "id": given if isinstance(given, str) and given else f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def openai_logprobs(logprobs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """OpenAI's `logprobs`, in which every token has all fields; None without tokens."""
    if not logprobs:
        return None
    return {"content": [{"bytes": None, "top_logprobs": []} | token for token in logprobs]}
