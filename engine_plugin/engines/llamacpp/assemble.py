"""A unary answer from the events of a stream, equal to what llama.cpp gives when it does not stream."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import BadGatewayError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["chat_completion", "text_completion"]

_COPIED = ("created", "model", "system_fingerprint", "id")
# Texts of a chat delta that grow piece by piece.
_TEXTS = ("content", "reasoning_content", "refusal")


def chat_completion(events: Iterable[dict[str, Any]]) -> bytes:
    """A chat.completion from chat.completion.chunk events."""
    messages: dict[int, dict[str, Any]] = {}

    def add(index: int, choice: dict[str, Any]) -> None:
        message = messages.setdefault(index, {"role": "assistant", "content": ""})
        _add_delta(message, choice.get("delta") or {})

    answer, choices = _gather(events, add)
    for index, choice in choices.items():
        choice["message"] = messages.get(index, {"role": "assistant", "content": ""})
    answer["object"] = "chat.completion"
    return _dump(answer, choices)


def text_completion(events: Iterable[dict[str, Any]]) -> bytes:
    """A text_completion from text_completion events; usage covers every prompt of a list."""
    texts: dict[int, list[str]] = {}
    answer, choices = _gather(
        events, lambda index, choice: texts.setdefault(index, []).append(choice.get("text") or "")
    )
    for index, choice in choices.items():
        choice["text"] = "".join(texts.get(index, ()))
        choice.setdefault("logprobs", None)
    answer["object"] = "text_completion"
    return _dump(answer, choices)


def _gather(events: Iterable[dict[str, Any]], add: Any) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Everything but the choices' text: `add(index, choice)` collects that."""
    answer: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    usages: list[dict[str, Any]] = []
    try:
        for event in events:
            for key in _COPIED:
                if key in event:
                    answer.setdefault(key, event[key])
            if event.get("timings"):
                answer["timings"] = event["timings"]
            if event.get("usage"):
                usages.append(event["usage"])
            for choice in event.get("choices") or ():
                index = choice.get("index", 0)
                add(index, choice)
                _add_choice(choices.setdefault(index, {"finish_reason": None, "index": index}), choice)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise BadGatewayError(f"the engine's stream is not understood: {error!r}") from error
    if not choices:
        raise BadGatewayError("the engine's stream ended without an answer")
    if usages:
        answer["usage"] = usages[0] if len(usages) == 1 else _sum_usage(usages)
    return answer, choices


def _add_choice(known: dict[str, Any], choice: dict[str, Any]) -> None:
    if choice.get("finish_reason"):
        known["finish_reason"] = choice["finish_reason"]
    more = choice.get("logprobs")
    if more:
        have = known.setdefault("logprobs", {})
        for key, values in more.items():
            if isinstance(values, list):
                have.setdefault(key, []).extend(values)


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for key, value in delta.items():
        if key in _TEXTS:
            if value is not None:
                message[key] = (message.get(key) or "") + value
        elif key == "tool_calls":
            calls = message.setdefault("tool_calls", [])
            for piece in value:
                _add_tool_call(calls, piece)
        elif value is not None:
            message[key] = value


def _add_tool_call(calls: list[dict[str, Any]], piece: dict[str, Any]) -> None:
    index = piece.get("index", len(calls))
    while len(calls) <= index:
        calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
    call, function = calls[index], piece.get("function") or {}
    for key in ("id", "type"):
        if piece.get(key):
            call[key] = piece[key]
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def _sum_usage(usages: list[dict[str, Any]]) -> dict[str, Any]:
    total = dict(usages[0])
    for usage in usages[1:]:
        for key, value in usage.items():
            if isinstance(value, int):
                total[key] = total.get(key, 0) + value
    return total


def _dump(answer: dict[str, Any], choices: dict[int, dict[str, Any]]) -> bytes:
    answer["choices"] = [choices[index] for index in sorted(choices)]
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
