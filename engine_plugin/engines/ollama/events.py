"""OpenAI's stream of events from Ollama's lines.

A line that holds a piece of text and nothing else, as nearly all do, is not parsed: its text, which is JSON already,
is set between bytes that were made once for the answer.
"""

from __future__ import annotations

import re
import secrets
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama import metrics
from engine_plugin.engines.ollama.errors import complains, complaint_error, complaint_of_line
from engine_plugin.engines.ollama.lines import (
    NOT_DONE,
    finish_reason,
    json_of,
    openai_call,
    openai_logprobs,
    piece_of,
)
from engine_plugin.engines.ollama.thinking import ThinkParser
from engine_plugin.errors import BadGatewayError, EnginePluginError
from engine_plugin.jsontext import write_json
from engine_plugin.openai_api.completions import CompletionLogprobs
from engine_plugin.transport.ndjson import read_line, whole_lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from engine_plugin.engines.ollama.lines import Piece
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["ChoiceWriter", "choice_events", "usage_event"]

_PLAIN = rb'[^"\\\x00-\x1f]'
_ESCAPED = rb'\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4})'
_TEXT = (
    b'"(?:' + _PLAIN + b"|" + _ESCAPED + b")" + _PLAIN + b"*+(?:" + _ESCAPED + _PLAIN + b'*+)*+"'
)  # not an empty one
_HEAD = rb'^\{"model":' + _TEXT + rb',"created_at":"' + _PLAIN + rb'*+",(?:"remote_\w+":' + _TEXT + rb",)*+"
_MESSAGE = rb'"message":\{"role":"assistant","content":'
_END = rb',"done":false\}\n'


def _lines(middle: bytes) -> re.Pattern[bytes]:
    return re.compile(_HEAD + middle + _END, re.MULTILINE)


# Lines as Ollama writes them, by what they hold; all others are parsed.
_SAID = {
    "chat": _lines(_MESSAGE + b"(" + _TEXT + rb")\}"),
    "generate": _lines(rb'"response":(' + _TEXT + b")"),
}
_THOUGHT = {
    "chat": _lines(_MESSAGE + rb'"","thinking":(' + _TEXT + rb")\}"),
    "generate": _lines(rb'"response":"","thinking":(' + _TEXT + b")"),
}


class ChoiceWriter:
    """One choice of a stream. `head` are the fields with which each event begins; `tags` says whether `<think>` tells
    thinking from what is said, as long as the server does not; `model` is the server's name of it, for complaints."""

    def __init__(self, service: str, head: dict[str, Any], index: int, *, tags: bool, model: str = "") -> None:
        self.last: dict[str, Any] = {}
        """The line that said done; {} before it came."""
        self.failure: EnginePluginError | None = None
        """What went wrong: after the events that were written."""
        self._model = model
        self._service = service
        self._head, self._index = head, index
        self._parser = ThinkParser() if tags else None
        self._calls = 0
        self._begun = False
        self._logprobs: list[dict[str, Any]] = []  # of text that is held back
        self._completion = CompletionLogprobs()
        self._field = "content" if service == "chat" else "text"
        self._around = {field: self._around_text(field) for field in (self._field, "reasoning_content")}
        self._made = tuple(before for before, _ in self._around.values())
        self._forms = (
            (_SAID[service], _setter(*self._around[self._field])),
            (_THOUGHT[service], _setter(*self._around["reasoning_content"])),
        )

    def write(self, lines: bytes) -> bytes:
        """The events of a block of whole lines, up to that with done or an error."""
        if self._begun or not lines:
            return self._write(lines)
        first, _, others = lines.partition(b"\n")
        begin = b"".join(self._line(first))
        return begin + self._write(others) if others and self._goes_on else begin

    def _write(self, lines: bytes) -> bytes:
        wanted, made = lines.count(b"\n"), 0
        if (self._parser is None or (self._parser.plain and not _has_tag(lines))) and _is_text(lines):
            for pattern, set_text in self._forms:
                lines, made_so = pattern.subn(set_text, lines)
                made += made_so
                if made == wanted:
                    return lines
                if self._parser is not None:
                    break  # with the first thinking that the server tells apart, tags are text
        if made == wanted - 1 and not lines.endswith(b"\n\n"):  # as where the last line says done
            cut = lines.rfind(b"\n", 0, -1) + 1
            return b"".join([lines[:cut], *self._line(lines[cut:-1])])
        events: list[bytes] = []
        for line in lines.split(b"\n"):
            if made and line.startswith(self._made):
                events.append(line + b"\n\n")
            elif line:
                events += self._line(line)
                if not self._goes_on:
                    break
        return b"".join(events)

    @property
    def _goes_on(self) -> bool:
        return not self.last and self.failure is None

    def _line(self, line: bytes) -> list[bytes]:
        try:
            shape = read_line(line)
            if complains(shape):
                raise complaint_error(complaint_of_line(shape), self._model)
            return self._events(shape, piece_of(self._service, shape))
        except EnginePluginError as error:
            self.failure = error
            return self._texts(*self._parser.end()) if self._parser is not None else []

    def _events(self, line: dict[str, Any], piece: Piece) -> list[bytes]:
        events = [] if self._begun or self._service != "chat" else [self._event({"role": "assistant", "content": ""})]
        self._begun = True
        self._logprobs += piece.logprobs
        events += self._texts(*self._divided(piece))
        if piece.calls and self._service == "chat":
            calls = [openai_call(call, self._calls + number) for number, call in enumerate(piece.calls)]
            self._calls += len(calls)
            events.append(self._event({"tool_calls": calls}))
        if piece.done:
            self.last = line
            events.append(self._finish(line))
        return events

    def _divided(self, piece: Piece) -> tuple[str, str]:
        """What the piece adds to thinking and to what is said."""
        if self._parser is None:
            return piece.thought, piece.said
        if piece.thought:
            thought, said = self._parser.end()
            self._parser = None
            return thought + piece.thought, said + piece.said
        thought, said = self._parser.feed(piece.said)
        if piece.done:
            last_thought, last_said = self._parser.end()
            thought, said = thought + last_thought, said + last_said
        return thought, said

    def _texts(self, thought: str, said: str) -> list[bytes]:
        events: list[bytes] = []
        for text, field in ((thought, "reasoning_content"), (said, self._field)):
            if text and self._logprobs:
                events.append(self._event({field: text}, self._logprobs))
                self._logprobs = []
            elif text:
                before, after = self._around[field]
                events.append(before + write_json(text) + after)
        return events

    def _finish(self, line: dict[str, Any]) -> bytes:
        reason = finish_reason(line, called=self._calls > 0)
        timings = metrics.timings(line)
        return self._event({}, self._logprobs, reason, {"timings": timings} if timings else {})

    def _event(
        self,
        delta: dict[str, Any],
        logprobs: Sequence[dict[str, Any]] = (),
        reason: str | None = None,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> bytes:
        choice: dict[str, Any] = {"index": self._index}
        choice |= {"delta": delta} if self._service == "chat" else {"text": ""} | delta
        choice |= {"logprobs": openai_logprobs(logprobs), "finish_reason": reason}
        if self._service == "generate":
            self._completion.reshape({"choices": [choice]})
        return _encoded({**self._head, "choices": [choice], **more})

    def _around_text(self, field: str) -> tuple[bytes, bytes]:
        """What stands before and behind the text in an event that has nothing else."""
        mark = secrets.token_hex(16)
        before, after = self._event({field: mark}).split(f'"{mark}"'.encode())
        return before, after


def _setter(before: bytes, after: bytes) -> Callable[[re.Match[bytes]], bytes]:
    """What makes an event of a line that holds a text, for `re`."""

    def set_text(found: re.Match[bytes]) -> bytes:
        return before + found[1] + after

    return set_text


def _has_tag(lines: bytes) -> bool:
    return b"<" in lines or b"\\u003" in lines  # Go writes `<` as \u003c


def _is_text(lines: bytes) -> bool:
    try:
        return lines.isascii() or bool(lines.decode())
    except UnicodeDecodeError:
        return False


def _encoded(shape: Mapping[str, Any]) -> bytes:
    """One event. Raises BadGatewayError for what no JSON can hold, though the server had it in its own."""
    return b"data: " + json_of(shape, separators=(",", ":")) + b"\n\n"


async def choice_events(writer: ChoiceWriter, response: HttpResponse) -> AsyncIterator[bytes]:
    """One choice's events as they come, up to that with its finish_reason.

    An error's line becomes an exception, after what came before it; an end without done a BadGatewayError.
    """
    async for lines in whole_lines(response):
        if events := writer.write(lines):
            yield events
        if writer.failure is not None:
            raise writer.failure
        if writer.last:
            return
    raise BadGatewayError(NOT_DONE)


def usage_event(head: Mapping[str, Any], lasts: Sequence[Mapping[str, Any]], choices_each: int) -> bytes:
    """The event that `stream_options.include_usage` asks for, from the last line of each choice."""
    return _encoded({**head, "choices": [], "usage": metrics.usage(lasts, choices_each)})
