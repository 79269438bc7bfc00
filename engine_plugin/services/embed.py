"""embed: OpenAI embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services.base import RequestValidator, optional, require

__all__ = ["Embed"]


class Embed(RequestValidator):
    """`input` (a text, a list of texts, or tokens) in, one vector for each out."""

    name: ClassVar[str] = "embed"

    def check(self, request: dict[str, Any]) -> None:
        texts = require(request, "input", str, list)
        if isinstance(texts, list):
            for index, text in enumerate(texts):
                if not isinstance(text, (str, int, list)) or isinstance(text, bool):
                    raise InvalidRequestError.at(f"input[{index}]", "must be a string or tokens")
        optional(request, "dimensions", int)
        optional(request, "encoding_format", str)

    def trivial_answer(self, request: dict[str, Any]) -> dict[str, Any] | None:
        if request["input"] != []:
            return None
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return {"object": "list", "data": [], "model": request["model"], "usage": usage}
