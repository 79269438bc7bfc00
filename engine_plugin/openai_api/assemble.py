"""Assembles a unary answer from a stream, for engines that notice a caller's leave only while they stream.

The answer equals the one that llama.cpp gives without streaming, except for `usage`: llama.cpp then counts the first
choice only; here all choices count, and each prompt once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_plugin.errors import BadGatewayError
from engine_plugin.jsontext import write_json
from engine_plugin.openai_api.bodies import choices_wanted
from engine_plugin.openai_api.completions import CompletionLogprobs, wants_logprobs
from engine_plugin.transport import sse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["assembled", "chat_completion", "text_completion"]

_COPIED = ("created", "model", "system_fingerprint", "id")
# The texts of a chat delta, which arrive in pieces.
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal")
_MOST_TOOL_CALLS = 1024


def assembled(service: str, blocks: Iterable[bytes], request: Mapping[str, Any]) -> bytes:
    """The answer to a chat or generate request from all blocks of its stream. Raises BadGatewayError."""
    assemble = chat_completion if service == "chat" else text_completion
    events = sse.event_data(b"".join(blocks))
    if wants_logprobs(service, request):
        events = map(CompletionLogprobs(request["logprobs"]).reshape, events)
    return write_json(assemble(events, choices_wanted(request)))


def chat_completion(events: Iterable[dict[str, Any]], choices_each: int = 1) -> dict[str, Any]:
    """A chat.completion from chat.completion.chunk events. `choices_each`: the request's `n`."""
    answer = _gather(events, lambda choice: choice.get("delta") or {}, choices_each)
    return answer | {"object": "chat.completion"}


def text_completion(events: Iterable[dict[str, Any]], choices_each: int = 1) -> dict[str, Any]:
    """A text_completion from text_completion events. `choices_each`: the request's `n`."""
    answer = _gather(events, lambda choice: {"content": choice.get("text") or ""}, choices_each)
    for choice in answer["choices"]:
        choice["text"] = choice.pop("message")["content"]
        choice.setdefault("logprobs", None)
    return answer | {"object": "text_completion"}


def _gather(
    events: Iterable[dict[str, Any]], delta_of: Callable[[dict[str, Any]], dict[str, Any]], choices_each: int
) -> dict[str, Any]:
    """The answer, with a message for each choice: the sum of what `delta_of` finds in the choice's events."""
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
                message = {"role": "assistant", "content": []}
                known = choices.setdefault(index, {"finish_reason": None, "index": index, "message": message})
                _add_delta(known["message"], delta_of(choice))
                _add_choice(known, choice)
        for choice in choices.values():
            _join_texts(choice["message"])
        if usages:
            answer["usage"] = usages[0] if len(usages) == 1 else _sum_usage(usages, choices_each)
        answer["choices"] = [choices[index] for index in sorted(choices)]
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise BadGatewayError(f"the engine's stream is not understood: {error!r}") from error
    if not choices:
        raise BadGatewayError("the engine's stream ended without an answer")
    return answer


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
    """Add to a message whose texts are lists of pieces, until `_join_texts`."""
    for key, value in delta.items():
        if key in _TEXTS:
            if value is not None:
                message.setdefault(key, []).append(value)
        elif key == "tool_calls":
            calls = message.setdefault("tool_calls", [])
            for piece in value:
                _add_tool_call(calls, piece)
        elif value is not None:
            message[key] = value


def _add_tool_call(calls: list[dict[str, Any]], piece: dict[str, Any]) -> None:
    index = piece.get("index", len(calls))
    if not 0 <= index < _MOST_TOOL_CALLS:
        raise IndexError(f"a tool call's index is {index}")
    while len(calls) <= index:
        calls.append({"type": "function", "function": {"name": [], "arguments": []}})
    call, function = calls[index], piece.get("function") or {}
    for key in ("id", "type"):
        if piece.get(key):
            call[key] = piece[key]
    for key, pieces in call["function"].items():
        pieces.append(function.get(key) or "")


def _join_texts(message: dict[str, Any]) -> None:
    """Replace the pieces of each text by the text. Raises TypeError for a piece that is not a text."""
    for key in message.keys() & set(_TEXTS):
        message[key] = "".join(message[key])
    for call in message.get("tool_calls", ()):
        call["function"] = {key: "".join(pieces) for key, pieces in call["function"].items()}


def _sum_usage(usages: list[dict[str, Any]], choices_each: int) -> dict[str, Any]:
    """The sum of the choices' usages."""
    prompt = sum(usage.get("prompt_tokens") or 0 for usage in usages) // choices_each
    completion = sum(usage.get("completion_tokens") or 0 for usage in usages)
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return usages[0] | counts
