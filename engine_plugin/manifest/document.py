"""The text of a plugin.yaml or plugin.json → plain data with the line of every key.

A manifest needs only a part of YAML: mappings, lists and scalars of the YAML 1.2 core schema (so `yes`, `on` and
`1:30` are text, as for a host written in Go). Anchors are ignored; aliases, merge keys, tags and a second document
are errors, because an alias can expand a small file without bound, and none of them makes a manifest clearer. The
data is built from parser events with an explicit stack, so that nesting cannot exhaust the interpreter's stack. The
same parser reads JSON, which is a subset except for surrogate escapes.
"""

from __future__ import annotations

import math
import os
import re
import stat
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

import yaml

from engine_plugin.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["INVALID", "MAX_BYTES", "MAX_DEPTH", "MAX_VALUES", "KeyPath", "Source", "read_document"]

KeyPath: TypeAlias = tuple[str | int, ...]
"""The path of a value, such as `("services", 0, "timeout")`."""

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 10_000

INVALID: Final[Any] = object()
"""Replaces a value whose problem was already reported; readers report no further problem for it."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")
_CONSTANTS: Final[dict[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
# 18 digits fit the host's 64 bits. A leading zero is octal for some parsers and decimal for others, so it is text.
_DECIMAL = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_PREFIXED = re.compile(r"0x[0-9a-fA-F]{1,15}|0o[0-7]{1,20}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


@dataclass(frozen=True, slots=True)
class Source:
    """The file of a manifest, and the 1-based line of each value in it.

    `written` has the original text of each number and boolean, such as 1.10 for 1.1.
    """

    file: str
    lines: Mapping[KeyPath, int]
    written: Mapping[KeyPath, str] = field(default_factory=dict)

    def line(self, path: KeyPath) -> int:
        """Return the line of `path`, or of its nearest existing parent."""
        for length in range(len(path), -1, -1):
            if (found := self.lines.get(path[:length])) is not None:
                return found
        return 0

    def problem(self, path: KeyPath, what: str, fix: str, severity: str = "error") -> Problem:
        """Create a problem at `path`."""
        return Problem(self.file, self.line(path), what, fix, severity)


def read_document(path: Path) -> tuple[Source, Any, list[Problem]]:
    """Read `path` into plain data. The data is INVALID if the file cannot be used at all. Never raises."""
    file = str(path)
    text = _read_text(path)
    if isinstance(text, Problem):
        return Source(file, {}), INVALID, [text]
    builder = _Builder(file)
    events: Any = yaml.parse(text, Loader=_LOADER)
    try:
        with closing(events):
            for event in events:
                builder.feed(event)
    except _UnreadableError:
        builder.root = INVALID
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # The pure Python parser raises ValueError and OverflowError for bad escapes and directives.
        builder.problems.append(_syntax_problem(file, text, error))
        builder.root = INVALID
    source = Source(file, builder.lines, builder.written)
    if builder.root is None:
        builder.problems.append(
            Problem(file, 0, "the file is empty", 'Begin with version: "1.0" and a provider: section')
        )
        builder.root = INVALID
    elif builder.root is not INVALID and not isinstance(builder.root, dict):
        builder.problems.append(source.problem((), "the file is not a mapping", 'Begin with version: "1.0"'))
        builder.root = INVALID
    return source, builder.root, builder.problems


def _read_text(path: Path) -> str | Problem:
    """Return the file's text, or the problem that prevents reading it."""
    file = str(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return Problem(file, 0, "this is not a regular file", "Name the plugin.yaml file itself")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        return Problem(file, 0, f"the file cannot be read: {reason}", "Check its path and permissions")
    if len(data) > MAX_BYTES:
        return Problem(
            file,
            0,
            "the file is larger than 1 MiB",
            "Check that this is the right file: a manifest has a few kilobytes",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return Problem(file, line, "the file is not UTF-8", "Save it in the encoding UTF-8")
    if found := _UNPRINTABLE.search(text.removeprefix("\ufeff")):
        line = text.count("\n", 0, found.start()) + 1
        what = f"the file contains a control character (U+{ord(found[0]):04X})"
        return Problem(file, line, what, "Remove it, or write it as an escape in double quotes")
    return text


def _syntax_problem(file: str, text: str, error: Exception) -> Problem:
    """Convert a parser's error into a problem at the line to correct."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return Problem(file, 0, f"not valid YAML: {error}", "Check escapes and directives (lines that begin with %)")
    mark = error.problem_mark
    lines = text.rstrip().splitlines()
    if error.context_mark and (mark is None or mark.line >= len(lines)):
        mark = error.context_mark  # for an open quote or bracket, name its beginning instead of the end of the file
    line = mark.line + 1 if mark else 0
    fix = "Check the indentation, colons, brackets and quotes here and just above"
    if 0 < line <= len(lines) and "\t" in lines[line - 1]:
        fix = "Indent with spaces, not with tabs"
    return Problem(file, line, f"not valid YAML: {error.problem or 'syntax error'}", fix)


class _UnreadableError(Exception):
    """The rest of the file cannot be read; the reason is among the builder's problems."""


@dataclass(slots=True)
class _Frame:
    """A mapping or list under construction."""

    path: KeyPath
    items: dict[str, Any] | list[Any]
    key: str | None = None
    keep: bool = True


class _Builder:
    """Builds plain data from parser events."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.root: Any = None
        self.lines: dict[KeyPath, int] = {}
        self.written: dict[KeyPath, str] = {}
        self.problems: list[Problem] = []
        self._stack: list[_Frame] = []
        self._documents = 0
        self._values = 0

    def feed(self, event: yaml.Event) -> None:
        """Process the next event. Raises _UnreadableError."""
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.CollectionEndEvent):
            self._stack.pop()
        elif isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._stop(line, "the file has a second document", "Keep one document: remove the line ---")
        elif isinstance(event, yaml.NodeEvent):
            self._node(event, line)

    def _complain(self, line: int, what: str, fix: str) -> None:
        self.problems.append(Problem(self.file, line, what, fix))

    def _stop(self, line: int, what: str, fix: str) -> NoReturn:
        self._complain(line, what, fix)
        raise _UnreadableError

    def _node(self, event: yaml.NodeEvent, line: int) -> None:
        self._values += 1
        if self._values > MAX_VALUES:
            self._stop(line, f"the file has more than {MAX_VALUES} values", "Remove unused sections")
        frame = self._stack[-1] if self._stack else None
        if frame and isinstance(frame.items, dict) and frame.key is None:
            self._key(frame, frame.items, event, line)
            return
        path = _place(frame)
        self.lines.setdefault(path, line)
        value = self._value(event, line)
        if isinstance(event, yaml.ScalarEvent) and isinstance(value, int | float):
            self.written.setdefault(path, event.value)
        if frame is None:
            self.root = value
        elif isinstance(frame.items, list):
            frame.items.append(value)
        else:
            if frame.keep and frame.key is not None:
                frame.items[frame.key] = value
            frame.key = None
        if isinstance(event, yaml.CollectionStartEvent):
            if len(self._stack) == MAX_DEPTH:
                self._stop(line, f"values are nested more than {MAX_DEPTH} deep", "Make the structure flatter")
            self._stack.append(_Frame(path, value))

    def _key(self, frame: _Frame, items: dict[str, Any], event: yaml.NodeEvent, line: int) -> None:
        if not isinstance(event, yaml.ScalarEvent):
            self._stop(line, "a key is not a scalar", "Write each key as a word before a colon")
        self._check_scalar(event, line)
        key = event.value
        path = (*frame.path, key)
        frame.key, frame.keep = key, True
        if key == "<<" and event.implicit[0]:
            self._complain(line, "merge keys (<<) are not supported", "Write the merged keys out")
            frame.keep = False
        elif key in items:
            what = f"duplicate key {key!r}, first defined in line {self.lines[path]}"
            self._complain(line, what, "Remove one of the two")
            frame.keep = False
        else:
            self.lines[path] = line

    def _value(self, event: yaml.NodeEvent, line: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            self._complain(line, f"the alias *{event.anchor} is not supported", "Write the value out")
            return INVALID
        if isinstance(event, yaml.ScalarEvent):
            if not self._check_scalar(event, line):
                return INVALID
            value = _scalar(event.value) if event.implicit[0] else event.value
            if isinstance(value, float) and not math.isfinite(value):
                self._complain(line, f"{event.value[:40]} is not a finite number", "Write a number, or quote a text")
                return INVALID
            return value
        self._refuse_tag(event, line)
        return {} if isinstance(event, yaml.MappingStartEvent) else []

    def _check_scalar(self, event: yaml.ScalarEvent, line: int) -> bool:
        if _UNUSABLE.search(event.value):
            self._complain(line, "a text contains a NUL or an unpaired surrogate", "Remove that escape")
            return False
        return self._refuse_tag(event, line)

    def _refuse_tag(self, event: Any, line: int) -> bool:
        if event.tag is None:
            return True
        self._complain(line, f"the tag {event.tag[:60]} is not supported", "Remove it; quote the value if it is text")
        return False


def _place(frame: _Frame | None) -> KeyPath:
    """Return the path of the next value in `frame`."""
    if frame is None:
        return ()
    if isinstance(frame.items, list):
        return (*frame.path, len(frame.items))
    return (*frame.path, frame.key or "")


def _scalar(text: str) -> str | int | float | bool | None:
    """Return the value of a plain scalar by the YAML 1.2 core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _DECIMAL.fullmatch(text):
        return int(text)
    if _PREFIXED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return math.nan
    return text
