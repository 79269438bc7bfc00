"""What a chat's request and its stream look like on each way: OpenAI's JSON or Ollama's, as events or as lines."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine_plugin.transport.sse import DONE

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OLLAMA_EVENTS", "OLLAMA_LINES", "OPENAI", "SENT", "Dialect"]

SENT = re.compile(rb'"sent\W+(\d+)')
"""In a stand-in's paced token: when it left, by the monotonic clock in nanoseconds."""

_STORY = "Tell me a story."


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a way is asked, and how its streams are counted."""

    make: Callable[[str, int, str, bool], dict[str, Any]]
    token: bytes
    """What stands once in each event, or line, of a stream but perhaps the last."""
    end: bytes
    """What stands in the last block of a whole stream."""

    def chat(self, model: str, tokens: int, *, pace: dict[str, float] | None = None, stream: bool = True) -> bytes:
        """A chat request for exactly that many tokens, the same ones every time; `pace` is a stand-in's."""
        said = json.dumps(pace) if pace else _STORY
        return json.dumps(self.make(model, tokens, said, stream)).encode()


def _openai(model: str, tokens: int, said: str, stream: bool) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": said}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "seed": 1,
        "stream": stream,
    }


def _ollama(model: str, tokens: int, said: str, stream: bool) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": said}],
        "options": {"num_predict": tokens, "temperature": 0, "seed": 1},
        "stream": stream,
    }


OPENAI = Dialect(_openai, b"data: {", DONE)
_DONE = b'"done":true'
OLLAMA_LINES = Dialect(_ollama, b'{"model":', _DONE)
OLLAMA_EVENTS = Dialect(_ollama, b"data: {", _DONE)
