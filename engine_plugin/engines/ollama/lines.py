"""A line of Ollama's streams: what it says, when it is the last one, and when it is an error.

chat has its texts in `message`, generate in `response`; all else is alike.
"""

from __future__ import annotations

import json
import reprlib
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import BadGatewayError
from engine_plugin.transport.answers import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["NOT_DONE", "Piece", "finish_reason", "json_of", "openai_call", "openai_logprobs", "piece_of"]

NOT_DONE = "the Ollama server's stream ended before it was done"

_REASONS = {"stop": "stop", "length": "length"}


@dataclass(slots=True)
class Piece:
    """What one line adds to an answer. `done` says that it is the last one."""

    said: str
    thought: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False


def piece_of(service: str, line: Mapping[str, Any]) -> Piece:
    """What a line says. Raises BadGatewayError when it is not of Ollama's form."""
    source = line.get("message") if service == "chat" else line
    if source is None:
        source = {}
    if not isinstance(source, dict):
        raise _strange(line)
    said = source.get("content" if service == "chat" else "response") or ""
    thought = source.get("thinking") or ""
    calls, logprobs = source.get("tool_calls") or [], line.get("logprobs") or []
    if not (isinstance(said, str) and isinstance(thought, str)):
        raise _strange(line)
    if not all(
        isinstance(several, list) and all(isinstance(one, dict) for one in several) for several in (calls, logprobs)
    ):
        raise _strange(line)
    return Piece(said, thought, calls, logprobs, line.get("done") is True)


def _strange(shape: Mapping[str, Any], what: str = "line") -> BadGatewayError:
    return BadGatewayError(f"the engine's {what} is not understood: {one_line(reprlib.repr(shape))}")


def json_of(shape: Any, separators: tuple[str, str] = (", ", ": ")) -> bytes:
    """What is made of a server's words, as JSON. Raises BadGatewayError for what no JSON can hold."""
    try:
        text = json.dumps(shape, ensure_ascii=False, allow_nan=False, separators=separators)
    except (ValueError, RecursionError) as error:
        raise BadGatewayError(f"the engine's answer cannot be told as JSON: {error}") from None
    return text.encode("utf-8", "replace")


def finish_reason(last: Mapping[str, Any], *, called: bool) -> str:
    """OpenAI's word for why an answer ended; `called` says that it called a tool."""
    reason = _REASONS.get(str(last.get("done_reason")), "stop")
    return "tool_calls" if called and reason == "stop" else reason


def openai_call(call: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A tool's call with its arguments as a text, and an id also where the server gives none."""
    function = call.get("function")
    name = function.get("name") or "" if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise _strange(call, "tool call")
    arguments, told = function.get("arguments"), call.get("id")
    if not isinstance(arguments, str):
        arguments = json_of({} if arguments is None else arguments).decode()
    return {
        "index": index,
        "id": told if isinstance(told, str) and told else f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def openai_logprobs(logprobs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """OpenAI's form has all fields always."""
    if not logprobs:
        return None
    return {"content": [{"bytes": None, "top_logprobs": []} | token for token in logprobs]}
