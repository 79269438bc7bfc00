"""A plugin's standard error, line by line: hclog JSON or plain text, into records of `logging`."""

from __future__ import annotations

import json
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
# A Go program that dies prints these, then its stack over many plain lines.
_FATAL = ("panic: ", "fatal error: ")

_MAX_LINE = 64 * 1024
_TAIL_LINES = 20
_TAIL_WIDTH = 500


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line that a plugin wrote: its level (trace, debug, info, warn, error), text and key-value pairs.

    As a string it leaves out the pairs that are hclog's own (`@module`).
    """

    level: str
    message: str
    kv: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        pairs = (f"{key}={value}" for key, value in self.kv.items() if not key.startswith("@"))
        return " ".join([self.message, *pairs])


def parse_line(text: str) -> LogLine:
    """Read one line: hclog JSON, else plain text whose `[LEVEL]` prefix, if any, sets the level."""
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
    try:
        fields = json.loads(text)
    except ValueError:
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("@message"), str):
        return None
    level = fields.pop("@level", "info")
    fields.pop("@timestamp", None)
    return LogLine(level if level in _LEVELS else "info", fields.pop("@message"), fields)


class LineSplitter:
    """Cuts bytes into lines of text. A line over 64 KiB comes in pieces, so that memory stays bounded."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[str]:
        """Take bytes as they arrive and yield every line they complete."""
        self._rest += data
        *lines, rest = self._rest.split(b"\n")
        self._rest = rest
        for line in lines:
            yield _text(line)
        if len(self._rest) >= _MAX_LINE:
            yield from self.close()

    def close(self) -> Iterator[str]:
        """The stream has ended: yield what is left."""
        if self._rest:
            line, self._rest = self._rest, bytearray()
            yield _text(line)


def _text(line: bytearray) -> str:
    return line.decode("utf-8", "replace").rstrip("\r")


class PluginLog:
    """Where a plugin's lines go: the logger `engine_plugin.host.<name>`, the caller's `on_log`, a short tail.

    A record carries the key-value pairs as its attribute `kv`.
    """

    def __init__(self, name: str, on_log: Callable[[LogLine], None] | None = None) -> None:
        self._logger = logging.getLogger(f"engine_plugin.host.{name}")
        self._on_log = on_log
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._fatal = False

    def tail(self) -> list[str]:
        """The last lines, oldest first, shortened."""
        return list(self._tail)

    def add(self, text: str) -> None:
        """Take one line. Raises what `on_log` raises."""
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
