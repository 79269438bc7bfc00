"""speech-to-text: the transcription of a recording."""

from __future__ import annotations

from typing import Any, ClassVar

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services.base import RequestValidator, choice, number, optional, words
from engine_plugin.system.data_urls import base64_start

__all__ = ["SpeechToText"]

_GRANULARITIES = ("segment", "word")


class SpeechToText(RequestValidator):
    """`audio` (base64 of a sound file, or a data: URL) in, `text` and `segments` with their seconds out."""

    name: ClassVar[str] = "speech-to-text"

    def check(self, request: dict[str, Any]) -> None:
        _check_audio(words(request, "audio"))
        optional(request, "language", str)
        choice(request, "task", ("transcribe", "translate"))
        choice(request, "response_format", ("json", "verbose_json", "text", "srt", "vtt"))
        number(request, "temperature", 0, 2)
        for index, granularity in enumerate(optional(request, "timestamp_granularities", list) or ()):
            if granularity not in _GRANULARITIES:
                raise InvalidRequestError.at(
                    f"timestamp_granularities[{index}]", f"must be one of {', '.join(_GRANULARITIES)}"
                )


def _check_audio(audio: str) -> None:
    """Check the form only: the engine decodes it, once. The limit of the request bounds its size."""
    try:
        empty = base64_start(audio) == len(audio)
    except ValueError as error:
        raise InvalidRequestError.at("audio", f"{error}") from None
    if empty or not audio.isascii():
        what = "holds no sound" if empty else "is not base64"
        raise InvalidRequestError.at("audio", f"{what}; give a sound file's bytes in base64, or a data: URL")
