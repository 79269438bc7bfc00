"""A line of Ollama's streams: what it says, when it is the last one, and when it is an error.

chat has its texts in `message`, generate in `response`; all else is alike.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import BadGatewayError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["NOT_DONE", "Piece", "finish_reason", "openai_call", "openai_logprobs", "piece_of"]

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


def _strange(line: Mapping[str, Any]) -> BadGatewayError:
    return BadGatewayError(f"the engine's line is not understood: {str(line)[:200]}")


def finish_reason(last: Mapping[str, Any], *, called: bool) -> str:
    """OpenAI's word for why an answer ended; `called` says that it called a tool."""
    reason = _REASONS.get(str(last.get("done_reason")), "stop")
    return "tool_calls" if called and reason == "stop" else reason


def openai_call(call: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A tool's call with its arguments as a text, and an id also where the server gives none."""
    function = call.get("function")
    if not isinstance(function, dict):
        raise BadGatewayError(f"the engine's tool call is not understood: {str(call)[:200]}")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments if arguments is not None else {}, ensure_ascii=False)
    return {
        "index": index,
        "id": str(call.get("id") or f"call_{secrets.token_hex(12)}"),
        "type": "function",
        "function": {"name": str(function.get("name") or ""), "arguments": arguments},
    }


def openai_logprobs(logprobs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """OpenAI's form has all fields always."""
    if not logprobs:
        return None
    return {"content": [{"bytes": None, "top_logprobs": []} | token for token in logprobs]}
