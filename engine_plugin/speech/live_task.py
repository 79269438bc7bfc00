"""The message protocol of a live transcription: commands and audio in, events out.

Each conversation is one task. It begins with the text message `{"action": "run-task", …}` or with audio. The command
or the metadata of a message may set `model`, `language`, `format`, `sample_rate`, `channels` and `task_id`. Without
`format`, the container is detected from the first bytes of the audio; raw samples need `format` or `sample_rate`.
`{"action": "finish-task"}` or the host's half-close ends the audio. The answers are text messages: task-started,
result-generated for each sentence as it grows, and task-finished or task-failed.

AOG removes the action from commands: a text message without one means run-task if it is the first message, and
finish-task after audio. In between it can mean either, and ends the task if no message follows within 10 seconds.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError
from engine_plugin.jsontext import JsonError, read_json, write_json
from engine_plugin.messages import ConversationMessage
from engine_plugin.speech.containers import HEAD, container_of
from engine_plugin.speech.decoder import FORMATS, RAW
from engine_plugin.speech.pcm import RATE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from engine_plugin.errors import EnginePluginError
    from engine_plugin.speech.live import Sentence

__all__ = ["LiveTask"]

_RUN, _FINISH = "run-task", "finish-task"
_TASK_KEYS = ("model", "language", "task_id", "ws_conn_id")
_AUDIO_DEFAULTS = {"format": "pcm", "sample_rate": str(RATE), "channels": "1"}
"""The settings that the first audio fixes, with their defaults. The first message fixes _TASK_KEYS."""

_KEYS = {name: name for name in (*_TASK_KEYS, *_AUDIO_DEFAULTS)} | {"audio_format": "format"}
"""The accepted names of settings, and the setting that each one stands for."""

_RATES = range(1000, 384_001)
_CHANNELS = range(1, 65)
_SHOWN = 40
_TAG = b"ID3"
_TAGGED_FORMATS = ("aac", "flac", "mp3")  # formats that an ID3 tag may precede
_END_TIMEOUT = 10.0
"""Seconds to wait for a message after one that may have ended the task."""


class LiveTask:
    """Reads the messages of one conversation and writes its events. Call `begin`, `detect_format`, then `audio`.

    Errors are InvalidRequestError and name the field.
    """

    def __init__(self, messages: AsyncIterator[ConversationMessage]) -> None:
        self.task_id = uuid.uuid4().hex
        self._messages = messages
        self._settings: dict[str, str] = {}
        self._fixed: frozenset[str] = frozenset()
        self._ended = False
        self._has_audio = False
        self._may_have_ended = False  # the last message may have been finish-task
        self._pending: bytes | None = None  # audio that was read but not yielded

    @property
    def model(self) -> str:
        """As the host set it, or ""."""
        return self._settings.get("model", "")

    @property
    def language(self) -> str:
        """As the host set it, or ""."""
        return self._settings.get("language", "")

    async def begin(self) -> None:
        """Read the first message. Raises InvalidRequestError if it cannot begin a task."""
        self._pending = await self._next()
        # AOG's client knows the task by the id of its connection.
        self.task_id = self._settings.get("ws_conn_id") or self._settings.get("task_id") or self.task_id
        self._fixed |= {*_TASK_KEYS}

    async def detect_format(self) -> tuple[str, int, int]:
        """Read until the format is known, or to the end: one of FORMATS, and for raw samples the rate and the number
        of channels. Raises InvalidRequestError for an unknown format."""
        head = self._pending or b""
        while len(head) < HEAD and self._settings.get("format") not in RAW and not self._ended:
            head += await self._next() or b""
        self._pending = head or None
        audio_format = self._detected_format(head)
        self._settings = {**_AUDIO_DEFAULTS, "format": audio_format, **self._settings}
        self._fixed |= _AUDIO_DEFAULTS.keys()
        return audio_format, self._number("sample_rate", _RATES), self._number("channels", _CHANNELS)

    def _detected_format(self, head: bytes) -> str:
        """The format: raw if named so, else detected from the first bytes, else as named, else raw samples if the
        rate is given."""
        named = self._settings.get("format", "")
        if named and named not in FORMATS:
            raise InvalidRequestError.at("format", f"{named[:_SHOWN]!r} is unknown; use one of {', '.join(FORMATS)}")
        is_raw = named in RAW or (not named and "sample_rate" in self._settings)
        audio_format = "" if named in RAW else container_of(head, by_frames=not is_raw)
        if named and (not audio_format or (head.startswith(_TAG) and named in _TAGGED_FORMATS)):
            return named
        if audio_format or is_raw or not head:
            return audio_format or "pcm"
        raise InvalidRequestError.at(
            "format",
            f"is missing, and the first bytes of the audio ({head[:8].hex(' ')}) match no known container. "
            "For raw samples, set format to pcm or set sample_rate",
        )

    async def audio(self) -> AsyncGenerator[bytes, None]:
        """Yield the audio as it arrives, to its end."""
        while self._pending is not None or not self._ended:
            data, self._pending = self._pending, None
            if data:
                yield data
            elif not self._ended:
                self._pending = await self._next()

    async def _next(self) -> bytes | None:
        """The audio of the next message; b"" for a command, None at the end."""
        message = await self._message()
        if message is None:
            self._ended = True
            return None
        self._set(message.metadata, "metadata.")
        if message.message_type != "text":
            self._has_audio |= bool(message.data)
            return message.data
        command = _command(message.data)
        action = command.get("action")
        if action is None and self._fixed and not self._has_audio:
            self._may_have_ended = True
            return b""
        if action is None:
            action = _FINISH if self._has_audio else _RUN
        if action == _FINISH:
            self._ended = True
            return None
        if action != _RUN:
            raise InvalidRequestError.at("action", f"{str(action)[:_SHOWN]!r} is unknown; use {_RUN} or {_FINISH}")
        if self._fixed:
            raise InvalidRequestError.at("action", f"{_RUN} in the middle of a task; each conversation is one task")
        self._set(command, "")
        return b""

    async def _message(self) -> ConversationMessage | None:
        """The next message; None at the end, or if none follows a possible finish-task in time."""
        try:
            async with asyncio.timeout(_END_TIMEOUT if self._may_have_ended else None):
                return await anext(self._messages, None)
        except TimeoutError:
            return None
        finally:
            self._may_have_ended = False

    def _set(self, given: Mapping[str, Any], place: str) -> None:
        for name, key in _KEYS.items():
            value = given.get(name)
            if value is None or value == "":
                continue
            if not isinstance(value, str | int) or isinstance(value, bool):
                raise InvalidRequestError.at(f"{place}{name}", "must be a string or a whole number")
            text = str(value).lower() if key == "format" else str(value)
            if key not in self._fixed:
                self._settings[key] = text
            elif text != self._settings.get(key):
                raise InvalidRequestError.at(f"{place}{name}", "cannot be set or changed in the middle of a task")

    def _number(self, key: str, bounds: range) -> int:
        text = self._settings[key]
        if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) in bounds):
            raise InvalidRequestError.at(
                key, f"must be a whole number from {bounds[0]} to {bounds[-1]}, not {text[:_SHOWN]!r}"
            )
        return int(text)

    # Answers

    def result(self, sentence: Sentence) -> ConversationMessage:
        """The current text of a sentence. Times are milliseconds, `sentence_id` counts from 0, and `stable_text` is
        not changed by later events."""
        shape = {
            "sentence_id": sentence.number,
            "text": sentence.text,
            "stable_text": sentence.stable,
            "begin_time": sentence.begin_ms,
            "end_time": sentence.end_ms,
            "is_final": sentence.final,
        }
        return self.event("result-generated", {"sentence": shape})

    def failed(self, error: EnginePluginError) -> ConversationMessage:
        # AOG's clients read the code as text.
        return self.event("task-failed", error_code=str(error.code), error_message=error.message)

    def event(self, event: str, output: dict[str, Any] | None = None, **header: Any) -> ConversationMessage:
        """An event of this task."""
        payload = {} if output is None else {"output": output}
        shape = {"header": {"task_id": self.task_id, "event": event, **header}, "payload": payload}
        return ConversationMessage(write_json(shape))


def _command(data: bytes) -> dict[str, Any]:
    """Flatten a text message: hosts put fields at the top level or inside `header`, `payload` and `parameters`."""
    try:
        command = read_json(data)
    except JsonError:
        command = None
    if not isinstance(command, dict):
        raise InvalidRequestError.at(
            "data", f'a text message must be a JSON object such as {{"action": "{_FINISH}"}}'
        )
    flat: dict[str, Any] = {}
    payload = command.get("payload")
    inner = payload.get("parameters") if isinstance(payload, dict) else None
    for part in (inner, command.get("parameters"), payload, command.get("header"), command):
        flat |= part if isinstance(part, dict) else {}
    return flat
