"""text-to-speech: a text read aloud."""

from __future__ import annotations

from typing import Any, ClassVar

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services.base import RequestValidator, choice, number, optional, words

__all__ = ["TextToSpeech"]


class TextToSpeech(RequestValidator):
    """`text` (or OpenAI's `input`) in, a WAV out: `audio` in base64, and `url`, its path on the plugin's machine."""

    name: ClassVar[str] = "text-to-speech"

    def check(self, request: dict[str, Any]) -> None:
        given = [field for field in ("text", "input") if request.get(field) is not None]
        if len(given) == 2 and request["text"] != request["input"]:
            raise InvalidRequestError.at("text", "differs from input; give one of the two")
        words(request, given[0] if given else "text")
        optional(request, "voice", str)
        optional(request, "language", str)
        number(request, "speed", 0.1, 10)
        choice(request, "response_format", ("wav",))
