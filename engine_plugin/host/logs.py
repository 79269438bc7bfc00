"""Converts the lines of a plugin's stderr, hclog JSON or plain text, into records of `logging`."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine_plugin.jsontext import json_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["LineSplitter", "LogLine", "PluginLog", "parse_line"]

_LEVELS = {
    "trace": logging.DEBUG - 5,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}
_PREFIXES = {f"[{name.upper()}]": name for name in _LEVELS}
# First words of a Go panic; many plain lines with the stack follow.
_FATAL = ("panic: ", "fatal error: ")

_MAX_LINE = 64 * 1024
_TAIL_LINES = 20
_TAIL_WIDTH = 500


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a plugin's log: level (trace, debug, info, warn, error), text and key-value pairs.

    `str` omits hclog's own pairs (`@module`).
    """

    level: str
    message: str
    kv: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        pairs = (f"{key}={value}" for key, value in self.kv.items() if not key.startswith("@"))
        return " ".join([self.message, *pairs])


def parse_line(text: str) -> LogLine:
    """Parse a line: hclog JSON, or plain text with an optional `[LEVEL]` prefix."""
    if text.startswith("{"):
        line = _parse_hclog(text)
        if line is not None:
            return line
    prefix, _, rest = text.partition(" ")
    level = _PREFIXES.get(prefix)
    if level is not None:
        return LogLine(level, rest.strip())
    return LogLine("error" if text.startswith(_FATAL) else "info", text)


def _parse_hclog(text: str) -> LogLine | None:
    fields = json_object(text)
    if fields is None or not isinstance(fields.get("@message"), str):
        return None
    level = fields.pop("@level", "info")
    fields.pop("@timestamp", None)
    return LogLine(level if level in _LEVELS else "info", fields.pop("@message"), fields)


class LineSplitter:
    """Splits bytes into lines of text. Lines over 64 KiB are split into pieces, to bound the memory."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[str]:
        """Add bytes and yield every completed line."""
        self._rest += data
        *lines, rest = self._rest.split(b"\n")
        self._rest = rest
        for line in lines:
            yield _text(line)
        if len(self._rest) >= _MAX_LINE:
            yield from self.close()

    def close(self) -> Iterator[str]:
        """Yield the rest at the end of the stream."""
        if self._rest:
            line, self._rest = self._rest, bytearray()
            yield _text(line)


def _text(line: bytearray) -> str:
    return line.decode("utf-8", "replace").rstrip("\r")


class PluginLog:
    """Passes a plugin's lines to the logger `engine_plugin.host.<name>` and to `on_log`, and keeps the last ones.

    Records have the key-value pairs in the attribute `kv`.
    """

    def __init__(self, name: str, on_log: Callable[[LogLine], None] | None = None) -> None:
        self._logger = logging.getLogger(f"engine_plugin.host.{name}")
        self._on_log = on_log
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._fatal = False

    def tail(self) -> list[str]:
        """Return the last lines, oldest first, shortened."""
        return list(self._tail)

    def add(self, text: str) -> None:
        """Add a line. Raises what `on_log` raises."""
        if not text.strip():
            return
        line = parse_line(text)
        if self._fatal and line.level == "info" and not text.startswith(("{", "[")):
            line = LogLine("error", line.message)
        self._fatal = self._fatal or text.startswith(_FATAL)
        self._tail.append(str(line)[:_TAIL_WIDTH])
        self._logger.log(_LEVELS[line.level], "%s", line, extra={"kv": line.kv})
        if self._on_log is not None:
            self._on_log(line)
