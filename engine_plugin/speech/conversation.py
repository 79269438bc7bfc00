"""The messages of a live transcription: a host's commands and sound in, events out.

A conversation is one task. It begins with the text message `{"action": "run-task", …}`, or just with sound; what it
needs to know stands in the command or in a message's metadata: `model`, `language`, `format`, `sample_rate`,
`channels`, `task_id`. Without `format` the sound's container is recognised by its first bytes; raw samples need
`format` or `sample_rate`. `{"action": "finish-task"}` or the host's half-close ends the sound. The answers are text
messages: task-started, result-generated for each sentence as it grows, task-finished or task-failed.

AOG strips commands of their action: a text message without one is run-task when it is the first message, and
finish-task when sound has been heard. In between it may be either, and ends the task if nothing follows soon.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError
from engine_plugin.jsontext import JsonError, read_json, write_json
from engine_plugin.messages import BidiMessage
from engine_plugin.speech.containers import HEAD, container_of
from engine_plugin.speech.decoder import FORMATS, RAW
from engine_plugin.speech.pcm import RATE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from engine_plugin.errors import EnginePluginError
    from engine_plugin.speech.live import Sentence

__all__ = ["Conversation"]

_RUN, _FINISH = "run-task", "finish-task"
_NAMES = {
    "model": "model",
    "language": "language",
    "format": "format",
    "audio_format": "format",
    "sample_rate": "sample_rate",
    "channels": "channels",
    "task_id": "task_id",
    "ws_conn_id": "ws_conn_id",
}
"""What may be set, as it may be called."""

_OF_THE_TASK = frozenset({"model", "language", "task_id", "ws_conn_id"})
_OF_THE_SOUND = {"format": "pcm", "sample_rate": str(RATE), "channels": "1"}
"""What is settled by the first message, and what is by the first sound, with its defaults."""

_RATES = range(1000, 384_001)
_CHANNELS = range(1, 65)
_SHOWN = 40
_TAG = b"ID3"
_TAGGED = ("aac", "flac", "mp3")  # formats before which a tag may stand
_DOUBT = 10.0
"""Seconds after a text that may mean the end, within which sound says that it did not."""


class Conversation:
    """Reads one conversation's messages. `begin` first, then `sound`; errors name what was sent."""

    def __init__(self, messages: AsyncIterator[BidiMessage]) -> None:
        self.task_id = uuid.uuid4().hex
        self._messages = messages
        self._settings: dict[str, str] = {}
        self._settled: frozenset[str] = frozenset()
        self._over = False
        self._heard = False
        self._in_doubt = False  # whether the last message may have meant the end
        self._waiting: bytes | None = None  # sound that was read already

    @property
    def model(self) -> str:
        """What the host named, or ""."""
        return self._settings.get("model", "")

    @property
    def language(self) -> str:
        """What the host named, or ""."""
        return self._settings.get("language", "")

    @property
    def form(self) -> str:
        """The sound's format, one of FORMATS; as the rest of the sound's, known once `sound_begins` has returned."""
        return self._form

    @property
    def sample_rate(self) -> int:
        """Of raw samples."""
        return self._number("sample_rate", _RATES)

    @property
    def channels(self) -> int:
        """Of raw samples."""
        return self._number("channels", _CHANNELS)

    async def begin(self) -> None:
        """Read the first message. Raises InvalidRequestError when it begins nothing."""
        self._waiting = await self._next()
        # AOG has told its client the connection's id as the task's.
        self.task_id = self._settings.get("ws_conn_id") or self._settings.get("task_id") or self.task_id
        self._settled |= _OF_THE_TASK

    async def sound_begins(self) -> None:
        """Read until there is enough sound to know its format, or the end. Raises InvalidRequestError for an unknown
        format."""
        head = self._waiting or b""
        while len(head) < HEAD and self._settings.get("format") not in RAW and not self._over:
            head += await self._next() or b""
        self._waiting = head or None
        self._form = self._recognised(head)
        self._settings = {**_OF_THE_SOUND, "format": self._form, **self._settings}
        self._settled |= _OF_THE_SOUND.keys()

    def _recognised(self, head: bytes) -> str:
        """The format: raw where that is said, else by the first bytes, else as it is named, or raw samples whose rate
        is known."""
        named = self._settings.get("format", "")
        if named and named not in FORMATS:
            raise InvalidRequestError.at("format", f"{named[:_SHOWN]!r} is unknown; use one of {', '.join(FORMATS)}")
        is_raw = named in RAW or (not named and "sample_rate" in self._settings)
        form = "" if named in RAW else container_of(head, by_frames=not is_raw)
        if named and (not form or (head.startswith(_TAG) and named in _TAGGED)):
            return named
        if form or is_raw or not head:
            return form or "pcm"
        raise InvalidRequestError.at(
            "format",
            f"is missing, and the sound's first bytes ({head[:8].hex(' ')}) match no known container. "
            "Raw samples need format pcm or sample_rate",
        )

    async def sound(self) -> AsyncGenerator[bytes, None]:
        """The sound as it comes, to its end."""
        while self._waiting is not None or not self._over:
            data, self._waiting = self._waiting, None
            if data:
                yield data
            elif not self._over:
                self._waiting = await self._next()

    async def _next(self) -> bytes | None:
        """The next message's sound; b"" of a command, None at the end."""
        message = await self._message()
        if message is None:
            self._over = True
            return None
        self._learn(message.metadata, "metadata.")
        if message.message_type != "text":
            self._heard |= bool(message.data)
            return message.data
        command = _command(message.data)
        action = command.get("action")
        if action is None and self._settled and not self._heard:
            self._in_doubt = True
            return b""
        if action is None:
            action = _FINISH if self._heard else _RUN
        if action == _FINISH:
            self._over = True
            return None
        if action != _RUN:
            raise InvalidRequestError.at("action", f"{str(action)[:_SHOWN]!r} is unknown; use {_RUN} or {_FINISH}")
        if self._settled:
            raise InvalidRequestError.at(
                "action", f"{_RUN} came in the middle of a task; one conversation is one task"
            )
        self._learn(command, "")
        return b""

    async def _message(self) -> BidiMessage | None:
        """The next message; None at the end, and when none follows a message that may have meant the end."""
        try:
            async with asyncio.timeout(_DOUBT if self._in_doubt else None):
                return await anext(self._messages, None)
        except TimeoutError:
            return None
        finally:
            self._in_doubt = False

    def _learn(self, given: Mapping[str, Any], place: str) -> None:
        for name, key in _NAMES.items():
            value = given.get(name)
            if value is None or value == "":
                continue
            if not isinstance(value, str | int) or isinstance(value, bool):
                raise InvalidRequestError.at(f"{place}{name}", "must be a text or a whole number")
            text = str(value).lower() if key == "format" else str(value)
            if key not in self._settled:
                self._settings[key] = text
            elif text != self._settings.get(key):
                raise InvalidRequestError.at(f"{place}{name}", "cannot change, or come, in the middle of a task")

    def _number(self, key: str, bounds: range) -> int:
        text = self._settings[key]
        if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) in bounds):
            raise InvalidRequestError.at(
                key, f"must be a whole number from {bounds[0]} to {bounds[-1]}, not {text[:_SHOWN]!r}"
            )
        return int(text)

    # Answers

    def started(self) -> BidiMessage:
        """The task is known and its model is there."""
        return self._event("task-started")

    def result(self, sentence: Sentence) -> BidiMessage:
        """A sentence as it is known now. Times are milliseconds; `sentence_id` counts from 0; what is in
        `stable_text` stays."""
        shape = {
            "sentence_id": sentence.number,
            "text": sentence.text,
            "stable_text": sentence.stable,
            "begin_time": sentence.begin_ms,
            "end_time": sentence.end_ms,
            "is_final": sentence.final,
        }
        return self._event("result-generated", {"sentence": shape})

    def finished(self) -> BidiMessage:
        """Every sentence was told."""
        return self._event("task-finished")

    def failed(self, error: EnginePluginError) -> BidiMessage:
        """The task ends before its time."""
        # AOG's clients read the code as text.
        return self._event("task-failed", error_code=str(error.code), error_message=error.message)

    def _event(self, event: str, output: dict[str, Any] | None = None, **header: Any) -> BidiMessage:
        payload = {} if output is None else {"output": output}
        shape = {"header": {"task_id": self.task_id, "event": event, **header}, "payload": payload}
        return BidiMessage(write_json(shape))


def _command(data: bytes) -> dict[str, Any]:
    """A text message as one flat object: hosts put what they say at the top, or below `header`, `payload` and
    `parameters`."""
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
