"""Normalizes OpenAI's chat messages for every engine: roles, texts, and arguments of tool calls."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError
from engine_plugin.jsontext import JsonError, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["CANNOT_HEAR", "CANNOT_SEE", "call_arguments", "joined", "make_plain", "past_calls", "plain_role"]

CANNOT_SEE = "this model reads text only and cannot see images; use a vision model"
CANNOT_HEAR = "this model reads text only and cannot hear audio; use a model that can, or transcribe it first"

_SHOWN = 80


def make_plain(body: dict[str, Any], refused: Mapping[str, str]) -> None:
    """Normalize the messages of a chat for a server with OpenAI's REST API. Called for each chat.

    The role `developer` becomes `system`, parts with only text become one text, and arguments of past calls become
    the text of a JSON object. `refused` maps a type of part to the reason why the model does not support it, "" to
    the reason for all types but text. Raises InvalidRequestError with the field's path.
    """
    if "messages" in body:
        body["messages"] = [
            _plain(message, f"messages[{index}]", refused) for index, message in enumerate(body["messages"])
        ]


def plain_role(role: str) -> str:
    """The role that every template supports: many render nothing for `developer`."""
    return "system" if role == "developer" else role


def joined(texts: list[str]) -> str:
    """The text parts of one message as one text."""
    return "\n".join(texts)


def call_arguments(arguments: Any, place: str) -> dict[str, Any]:
    """Parse the arguments of a past call, which OpenAI sends as the text of a JSON object; an empty text means none.

    Raises InvalidRequestError, beginning with `place`, also for truncated arguments.
    """
    if isinstance(arguments, str):
        try:
            arguments = read_json(arguments.encode()) if arguments.strip() else {}
        except JsonError as error:
            raise InvalidRequestError.at(place, f"must be the text of a JSON object; it {error}") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise InvalidRequestError.at(place, f"must be a JSON object, not {json.dumps(arguments)[:_SHOWN]}")
    return arguments


def past_calls(message: dict[str, Any], place: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The calls in a message of an assistant, each with its arguments. Raises InvalidRequestError."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise InvalidRequestError.at(f"{place}.tool_calls", "must be a list")
    for index, call in enumerate(calls):
        here = f"{place}.tool_calls[{index}].function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequestError.at(here, "must be an object with a name and arguments")
        yield call, call_arguments(function.get("arguments"), f"{here}.arguments")


def _plain(message: dict[str, Any], place: str, refused: Mapping[str, str]) -> dict[str, Any]:
    plain = message | {"role": plain_role(message["role"])}
    content = message.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            why = refused.get(kind if isinstance(kind, str) else "") or (refused.get("") if kind != "text" else None)
            if why:
                raise InvalidRequestError.at(f"{place}.content[{index}]", f"{why}")
            if kind == "text" and not isinstance(part.get("text"), str):
                raise InvalidRequestError.at(f"{place}.content[{index}].text", "must be a string")
        if content and all(_is_text(part) for part in content):
            plain["content"] = joined([part["text"] for part in content])
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise InvalidRequestError.at(f"{place}.reasoning_content", "must be a string")
    if message.get("tool_calls"):
        plain["tool_calls"] = [_with_text(call, arguments) for call, arguments in past_calls(message, place)]
    return plain


def _is_text(part: Any) -> bool:
    """Whether a part has only text: servers may support further fields."""
    return (
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


def _with_text(call: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The call with its arguments as the text of a JSON object."""
    given = call["function"].get("arguments")
    as_it_is = isinstance(given, str) and given.strip() and "\\u" not in given  # half a surrogate pair may be escaped
    text = given if as_it_is else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": call["function"] | {"arguments": text}}
