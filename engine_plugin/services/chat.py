"""chat: OpenAI chat completions."""

from __future__ import annotations

from typing import Any, ClassVar

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services.base import RequestValidator, check_stop, optional, require
from engine_plugin.services.pictures import check_pictures, pictures_of

__all__ = ["Chat"]


class Chat(RequestValidator):
    """`messages` in, a chat.completion (or its chunks) out."""

    name: ClassVar[str] = "chat"
    nested: ClassVar[frozenset[str]] = frozenset(
        {"messages", "tools", "tool_choice", "response_format", "stream_options"}
    )

    def check(self, request: dict[str, Any]) -> None:
        messages = require(request, "messages", list)
        if not messages:
            raise InvalidRequestError.at("messages", "is empty; a chat needs at least one message")
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise InvalidRequestError.at(f"messages[{index}]", "must be an object with a role and content")
        check_pictures(pictures_of(messages))
        for index, tool in enumerate(optional(request, "tools", list) or ()):
            _check_tool(tool, f"tools[{index}]")
        check_stop(request)
        optional(request, "tool_choice", str, dict)
        optional(request, "response_format", dict)


def _check_tool(tool: Any, place: str) -> None:
    """Only functions are checked; the engine accepts or rejects other kinds of tools."""
    function = tool.get("function") if isinstance(tool, dict) else None
    named = isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]
    if not isinstance(tool, dict) or (tool.get("type", "function") == "function" and not named):
        raise InvalidRequestError.at(place, 'must be {"type": "function", "function": {"name": …}}')
