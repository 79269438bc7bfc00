"""The events of a stream from Ollama's lines: OpenAI's, or the lines themselves.

A line with text and nothing else, as nearly all are, is not parsed: its text, which is JSON already, is inserted
between bytes that are made once for each choice.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama.answers import (
    delta_of,
    finish_reason,
    openai_call,
    openai_logprobs,
    timings,
    to_json,
    usage,
)
from engine_plugin.engines.ollama.errors import checked_line
from engine_plugin.engines.ollama.thinking import ThinkParser
from engine_plugin.errors import EnginePluginError
from engine_plugin.jsontext import write_json
from engine_plugin.openai_api.completions import CompletionLogprobs
from engine_plugin.transport.ndjson import EVENT_ADDS, as_events, read_line, split_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engine_plugin.engines.ollama.answers import Delta

__all__ = ["ChoiceWriter", "NativeWriter", "usage_event"]

_COMPACT = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_PLAIN = rb'[^"\\\x00-\x1f]'
_ESCAPED = rb'\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4})'
_TEXT = (
    b'"(?:' + _PLAIN + b"|" + _ESCAPED + b")" + _PLAIN + b"*+(?:" + _ESCAPED + _PLAIN + b'*+)*+"'
)  # a text that is not empty
_HEAD = rb'^\{"model":' + _TEXT + rb',"created_at":"' + _PLAIN + rb'*+",(?:"remote_\w+":' + _TEXT + rb",)*+"
_MESSAGE = rb'"message":\{"role":"assistant","content":'
_END = rb',"done":false\}\n'
_NOT_DONE = b',"done":false}\n'
"""The end of each line but the last, as Ollama writes it."""


def _lines(middle: bytes) -> re.Pattern[bytes]:
    return re.compile(_HEAD + middle + _END, re.MULTILINE)


# The lines of text as Ollama writes them, by their fields in events. All others are parsed.
_LINES = {
    "chat": {
        "content": _lines(_MESSAGE + b"(" + _TEXT + rb")\}"),
        "reasoning_content": _lines(_MESSAGE + rb'"","thinking":(' + _TEXT + rb")\}"),
    },
    "generate": {
        "text": _lines(rb'"response":(' + _TEXT + b")"),
        "reasoning_content": _lines(rb'"response":"","thinking":(' + _TEXT + b")"),
    },
}


class ChoiceWriter:
    """Writes the events of one choice of a stream.

    `head` has the first fields of each event. With `tags`, `<think>` tags separate thinking from content until the
    server does so itself. `model` is the server's name of the model, for errors.
    """

    def __init__(self, service: str, head: dict[str, Any], index: int, *, tags: bool, model: str = "") -> None:
        self.last: dict[str, Any] = {}
        """The last line, with `done: true`; {} before it arrives."""
        self.failure: EnginePluginError | None = None
        """The error that follows the events written so far."""
        self._model = model
        self._service = service
        self._head, self._index = head, index
        self._parser = ThinkParser() if tags else None
        self._calls = 0
        self._logprobs: list[dict[str, Any]] = []  # of text that the parser holds back
        self._completion = CompletionLogprobs()
        self._field = "content" if service == "chat" else "text"
        self._around = {field: self._around_text(field) for field in _LINES[service]}
        self._converted = tuple(before for before, _ in self._around.values())
        self._forms = [(pattern, self._inserter(field)) for field, pattern in _LINES[service].items()]
        self._first = self._event({"role": "assistant", "content": ""}) if service == "chat" else b""
        """The event before all others, until it is written."""

    def write(self, lines: bytes) -> bytes:
        """Convert a block of whole lines to events, up to the last line or the first error."""
        events = self._converted_lines(lines)
        if events and self._first:
            events, self._first = self._first + events, b""
        return events

    def _converted_lines(self, lines: bytes) -> bytes:
        events: list[bytes] = []
        start = 0
        while self._parser is not None and not self._parser.plain and start < len(lines):
            end = lines.find(b"\n", start) + 1 or len(lines)
            if line := lines[start:end].strip():
                events += self._line(line)
                if self._over:
                    return b"".join(events)
            start = end
        lines = lines[start:]
        wanted, converted = lines.count(b"\n"), 0
        if (self._parser is None or (self._parser.plain and not _has_tag(lines))) and _is_utf8(lines):
            for pattern, insert in self._forms:
                lines, count = pattern.subn(insert, lines)
                converted += count
                if converted == wanted:
                    return b"".join([*events, lines])
                if self._parser is not None:
                    break  # once the server separates the thinking, tags are content
        for line in lines.split(b"\n"):
            if converted and line.startswith(self._converted):
                events.append(line + b"\n\n")
            elif line.strip():
                events += self._line(line)
                if self._over:
                    break
        return b"".join(events)

    @property
    def _over(self) -> bool:
        """Whether the last line or an error was converted."""
        return bool(self.last) or self.failure is not None

    def _line(self, line: bytes) -> list[bytes]:
        try:
            shape = checked_line(read_line(line), self._model)
            return self._events(shape, delta_of(self._service, shape))
        except EnginePluginError as error:
            self.failure = error
            return self._texts(*self._parser.end()) if self._parser is not None else []

    def _events(self, line: dict[str, Any], delta: Delta) -> list[bytes]:
        self._logprobs += delta.logprobs
        events = self._texts(*self._split(delta))
        if delta.calls and self._service == "chat":
            calls = [{"index": index} | openai_call(call) for index, call in enumerate(delta.calls, self._calls)]
            self._calls += len(calls)
            events.append(self._event({"tool_calls": calls}))
        if delta.done:
            self.last = line
            events.append(self._finish(line))
        return events

    def _split(self, delta: Delta) -> tuple[str, str]:
        """The thinking and the content of a line."""
        if self._parser is None:
            return delta.thinking, delta.content
        if delta.thinking:
            thinking, content = self._parser.end()
            self._parser = None
            return thinking + delta.thinking, content + delta.content
        thinking, content = self._parser.feed(delta.content)
        if delta.done:
            last_thinking, last_content = self._parser.end()
            thinking, content = thinking + last_thinking, content + last_content
        return thinking, content

    def _texts(self, thinking: str, content: str) -> list[bytes]:
        events: list[bytes] = []
        for text, field in ((thinking, "reasoning_content"), (content, self._field)):
            if text and self._logprobs:
                events.append(self._event({field: text}, self._logprobs))
                self._logprobs = []
            elif text:
                before, after = self._around[field]
                events.append(before + write_json(text) + after)
        return events

    def _finish(self, line: dict[str, Any]) -> bytes:
        reason = finish_reason(line, called=self._calls > 0)
        speed = timings(line)
        return self._event({}, self._logprobs, reason, **({"timings": speed} if speed else {}))

    def _event(
        self, delta: dict[str, Any], logprobs: Sequence[dict[str, Any]] = (), reason: str | None = None, **more: Any
    ) -> bytes:
        choice: dict[str, Any] = {"index": self._index}
        choice |= {"delta": delta} if self._service == "chat" else {"text": ""} | delta
        choice |= {"logprobs": openai_logprobs(logprobs), "finish_reason": reason}
        if self._service == "generate":
            self._completion.reshape({"choices": [choice]})
        return _event_of({**self._head, "choices": [choice], **more})

    def _around_text(self, field: str) -> tuple[bytes, bytes]:
        """The bytes before and after the text in an event that has nothing else."""
        mark = os.urandom(16).hex()
        before, after = self._event({field: mark}).split(f'"{mark}"'.encode())
        return before, after

    def _inserter(self, field: str) -> Callable[[re.Match[bytes]], bytes]:
        """The replacement for `re.subn` that makes an event of a line of text."""
        before, after = self._around[field]
        return lambda found: before + found[1] + after


class NativeWriter:
    """Writes the events of a native stream: the lines unchanged. `model` is the server's name of the model."""

    def __init__(self, model: str) -> None:
        self.last: dict[str, Any] = {}
        """The last line, with `done: true`; {} before it arrives."""
        self.failure: EnginePluginError | None = None
        """The error that follows the events written so far."""
        self._model = model

    def write(self, lines: bytes) -> bytes:
        """Convert a block of whole lines to events, up to the last line or the first error.

        An error is an error line, or a line that is not a JSON object.
        """
        # Quotes inside JSON strings are escaped, so that `"error"` is a field.
        if b'"error"' not in lines and b"\r" not in lines:
            events = as_events(lines)
            if len(events) - len(lines) == EVENT_ADDS * lines.count(_NOT_DONE):
                return events  # nearly always: all lines have this end
        good: list[bytes] = []
        try:
            for line in split_lines(lines):
                if not line.endswith(b"}") or b"true" in line or b'"error"' in line:
                    shape = checked_line(read_line(line), self._model)
                    self.last = shape if shape.get("done") is True else {}  # tool arguments may have a `done`
                good.append(b"data: " + line + b"\n\n")
                if self.last:
                    break
        except EnginePluginError as error:
            self.failure = error
        return b"".join(good)


def _has_tag(lines: bytes) -> bool:
    return b"<" in lines or b"\\u003" in lines  # Go writes `<` as \u003c


def _is_utf8(lines: bytes) -> bool:
    try:
        return lines.isascii() or bool(lines.decode())
    except UnicodeDecodeError:
        return False


def _event_of(shape: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(shape, _COMPACT) + b"\n\n"


def usage_event(head: Mapping[str, Any], lasts: Sequence[Mapping[str, Any]], choices_each: int) -> bytes:
    """The event that `stream_options.include_usage` requests, from the last line of each choice."""
    return _event_of({**head, "choices": [], "usage": usage(lasts, choices_each)})
