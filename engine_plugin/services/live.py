"""speech-to-text-ws: live transcription, message by message.

There is no request: binary messages are sound, text messages are commands in JSON. `model`, `language`, `format` and
`sample_rate` come in the metadata of a message, or in a command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from engine_plugin.errors import InvalidRequestError
from engine_plugin.jsontext import BRIEF
from engine_plugin.services.base import parse_request

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LiveTranscription"]

_RATES = range(1000, 384_001)

# Quotes inside a sentence's text are escaped: only the event's name can match.
_STARTED, _FAILED = b'"task-started"', b'"task-failed"'


class LiveTranscription:
    """Sound in, sentences with their milliseconds out. Stateless, like a `RequestValidator`."""

    name: ClassVar[str] = "speech-to-text-ws"

    def tells_failure(self, answer: bytes) -> bool:
        """Whether this answer announces that the conversation fails; the engine then raises the error."""
        return _FAILED in answer

    def tells_start(self, answer: bytes) -> bool:
        """Whether this answer only announces that the conversation has begun."""
        return _STARTED in answer

    def check(self, data: bytes, message_type: str, metadata: Mapping[str, str]) -> None:
        """Raise InvalidRequestError, naming what is wrong, when no engine could understand this message."""
        if message_type == "text":
            _check_command(data)
        elif message_type not in ("binary", ""):
            raise InvalidRequestError.at("message_type", f"must be text or binary, not {message_type[:60]!r}")
        rate = metadata.get("sample_rate")
        if rate and not (rate.isascii() and rate.isdigit() and len(rate) < 8 and int(rate) in _RATES):
            raise InvalidRequestError.at(
                "metadata.sample_rate", f"must be 1000 to 384000 samples a second, not {rate[:60]!r}"
            )


def _check_command(data: bytes) -> None:
    if len(data) > BRIEF:
        raise InvalidRequestError.at(
            "data", f"a command has at most {BRIEF >> 10} KiB, not {len(data)} bytes; send sound as binary messages"
        )
    parse_request(data, "data")
