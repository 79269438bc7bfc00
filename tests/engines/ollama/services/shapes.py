"""Makers of requests, facts and lines, and parsers of events."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from engine_plugin.engines.ollama.models import ModelFacts
from engine_plugin.transport.sse import event_data

__all__ = ["chat", "chat_line", "data_of", "facts_of", "joined", "line", "no_replacement"]


def facts_of(
    name: str = "tiny-chat:latest",
    *features: str,
    native: bool = False,
    parameter_size: str = "",
    keep_alive: str = "",
    **options: int,
) -> ModelFacts:
    """Facts of a model; without `features` its features are unknown. `options` are `num_ctx` and `num_thread`."""
    return ModelFacts(name, frozenset(features), parameter_size, options, keep_alive, native)


async def no_replacement() -> NoReturn:
    """The server of a test is replaced by no other one."""
    raise AssertionError


def chat(content: Any = "hello", model: str = "tiny-chat:latest", **more: Any) -> dict[str, Any]:
    """A chat request of one message."""
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


def line(**fields: Any) -> bytes:
    """A line in Ollama's format."""
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode() + b"\n"


def chat_line(content: str = "", *, done: bool = False, thinking: str = "", **more: Any) -> bytes:
    """A line of a chat stream."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    created = "2026-11-21T10:46:49.782701123Z"
    return line(model="tiny-chat:latest", created_at=created, message=message, done=done, **more)


def data_of(events: bytes) -> list[dict[str, Any]]:
    """The objects of a stream's events."""
    return list(event_data(events))


def joined(events: bytes, field: str = "content", index: int = 0) -> str:
    """The joined deltas of one choice."""
    choices = [choice for event in data_of(events) for choice in event["choices"] if choice["index"] == index]
    return "".join(choice.get("delta", choice).get(field) or "" for choice in choices)
