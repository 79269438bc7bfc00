"""generate: OpenAI text completions."""

from __future__ import annotations

from typing import Any, ClassVar

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services.base import RequestValidator, check_stop, require
from engine_plugin.services.pictures import check_pictures, listed

__all__ = ["Generate"]


class Generate(RequestValidator):
    """`prompt` in, a text_completion (or its chunks) out."""

    name: ClassVar[str] = "generate"
    nested: ClassVar[frozenset[str]] = frozenset({"response_format", "stream_options"})

    def check(self, request: dict[str, Any]) -> None:
        prompt = require(request, "prompt", str, list)
        if isinstance(prompt, list) and not prompt:
            raise InvalidRequestError.at("prompt", "is an empty list; give at least one prompt")
        check_stop(request)
        check_pictures(listed(request.get("images"), "images"))
