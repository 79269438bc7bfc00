"""What a chat's request and its stream look like on each way: OpenAI's JSON or Ollama's, as events or as lines."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine_plugin.transport.sse import DONE

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OLLAMA_EVENTS", "OLLAMA_LINES", "OPENAI", "TOKEN", "Dialect"]

TOKEN = re.compile(rb'" (\d+)(?: sent (\d+))?"')
"""The text of a stand-in's token: its number, and when a paced one left, by the monotonic clock in nanoseconds."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a way is asked, and how its streams are counted."""

    make: Callable[[str, int, str, bool], dict[str, Any]]
    token: bytes
    """What stands once in each event, or line, of a stream but perhaps the last."""
    end: bytes
    """What stands in the last block of a whole stream."""

    def chat(self, model: str, tokens: int, *, stream: bool = True, **more: float | str) -> bytes:
        """A chat request for exactly that many tokens, the same ones every time.

        A stand-in reads its only message: a JSON object with the tokens, and with `more` of `upstream.Wanted`.
        """
        said = json.dumps({"tokens": tokens, **more})
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


_DONE = b'"done":true'

OPENAI = Dialect(_openai, b"data: {", DONE)
OLLAMA_LINES = Dialect(_ollama, b'{"model":', _DONE)
OLLAMA_EVENTS = Dialect(_ollama, b"data: {", _DONE)
