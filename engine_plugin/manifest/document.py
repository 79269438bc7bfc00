"""The text of a plugin.yaml or plugin.json → plain data with the line of every key.

A manifest needs only a part of YAML: mappings, lists and scalars of the YAML 1.2 core schema (so `yes`, `on` and
`1:30` are text, as for a host written in Go). Anchors are ignored; aliases, merge keys, tags and a second document
are errors, because an alias can expand a small file without bound, and none of them makes a manifest clearer. The
data is built from parser events, so that the depth is bounded before anything recurses. The same parser reads JSON,
which is a subset except for surrogate escapes.
"""

from __future__ import annotations

import math
import os
import re
import stat
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import yaml

from engine_plugin.errors import ManifestError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["INVALID", "MAX_BYTES", "MAX_DEPTH", "MAX_VALUES", "KeyPath", "Source", "read_document", "write_parsed"]

KeyPath: TypeAlias = tuple[str | int, ...]
"""The path of a value, such as `("services", 0, "timeout")`."""

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 10_000

INVALID: Final[Any] = object()
"""Replaces a value whose problem was already reported; readers report no further problem for it."""

# Compiled when they are needed, which takes milliseconds.
_UNPRINTABLE = "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
_UNUSABLE = "[\x00\ud800-\udfff]"
_CONSTANTS: Final[dict[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
# 18 digits fit the host's 64 bits. A leading zero is octal for some parsers and decimal for others, so it is text.
_DECIMAL = r"[-+]?(?:0|[1-9][0-9]{0,17})"
_PREFIXED = r"0x[0-9a-fA-F]{1,15}|0o[0-7]{1,20}"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
_NOT_FINITE = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"


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


class _UnusableError(Exception):
    """The file cannot be used, or the rest of it cannot be read. Has the line, what is wrong, and the fix."""

    def __init__(self, line: int, what: str, fix: str) -> None:
        super().__init__(line, what, fix)


def read_document(path: Path, parsed: Path | None = None) -> tuple[Source, Any, list[Problem]]:
    """Read `path` into plain data. The data is INVALID if the file cannot be used at all. Never raises.

    `parsed` is a file of `write_parsed` for the same content, which is read in its place if that is possible.
    """
    if parsed is not None and (known := _read_parsed(path, parsed)):
        return (*known, [])
    reader = _Reader(str(path))
    try:
        data = reader.read(_read_text(path))
    except _UnusableError as error:
        reader.complain(*error.args)
        data = INVALID
    return Source(reader.file, reader.lines, reader.written), data, reader.problems


def write_parsed(path: Path, target: Path) -> None:
    """Write the content of a manifest that has no problems, for `read_document` to read without a YAML parser.

    Called by the build of a plugin. Raises ManifestError, OSError.
    """
    import json

    source, data, problems = read_document(path)
    if problems:
        raise ManifestError(problems)
    places = [[list(place), line, source.written.get(place)] for place, line in source.lines.items()]
    target.write_text(json.dumps({"data": data, "places": places}, separators=(",", ":")), encoding="utf-8")


def _read_parsed(path: Path, parsed: Path) -> tuple[Source, Any] | None:
    """The content of a file of `write_parsed`; None if it cannot be read."""
    import json

    try:
        value = json.loads(parsed.read_bytes())
        places = [(tuple(place), line, written) for place, line, written in value["places"]]
        data = value["data"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    lines = {place: line for place, line, _ in places}
    return Source(str(path), lines, {place: written for place, _, written in places if written is not None}), data


def _read_text(path: Path) -> str:
    """Return the file's text. Raises _UnusableError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _UnusableError(0, "this is not a regular file", "Name the plugin.yaml file itself")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise _UnusableError(0, f"the file cannot be read: {reason}", "Check its path and permissions") from error
    if len(data) > MAX_BYTES:
        fix = "Check that this is the right file: a manifest has a few kilobytes"
        raise _UnusableError(0, "the file is larger than 1 MiB", fix)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _UnusableError(line, "the file is not UTF-8", "Save it in the encoding UTF-8") from error
    if found := re.search(_UNPRINTABLE, text.removeprefix("\ufeff")):
        line = text.count("\n", 0, found.start()) + 1
        what = f"the file contains a control character (U+{ord(found[0]):04X})"
        raise _UnusableError(line, what, "Remove it, or write it as an escape in double quotes")
    return text


def _syntax_error(text: str, error: Exception) -> _UnusableError:
    """Convert a parser's error, with the line to correct."""
    if not isinstance(error, yaml.MarkedYAMLError):
        fix = "Check escapes and directives (lines that begin with %)"
        return _UnusableError(0, f"not valid YAML: {error}", fix)
    mark = error.problem_mark
    lines = text.rstrip().splitlines()
    if error.context_mark and (mark is None or mark.line >= len(lines)):
        mark = error.context_mark  # for an open quote or bracket, name its beginning instead of the end of the file
    line = mark.line + 1 if mark else 0
    fix = "Check the indentation, colons, brackets and quotes here and just above"
    if 0 < line <= len(lines) and "\t" in lines[line - 1]:
        fix = "Indent with spaces, not with tabs"
    return _UnusableError(line, f"not valid YAML: {error.problem or 'syntax error'}", fix)


class _Reader:
    """Builds plain data from parser events. Its recursion is as deep as the values, at most MAX_DEPTH."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[KeyPath, int] = {}
        self.written: dict[KeyPath, str] = {}
        self.problems: list[Problem] = []
        self._events: Any = iter(())
        self._values = 0

    def complain(self, line: int, what: str, fix: str) -> None:
        """Report a problem."""
        self.problems.append(Problem(self.file, line, what, fix))

    def read(self, text: str) -> dict[str, Any]:
        """Return the mapping of the file's only document. Raises _UnusableError."""
        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self._events = yaml.parse(text, Loader=loader)
        with closing(self._events):
            try:
                data = self._document()
            except (yaml.YAMLError, ValueError, OverflowError) as error:
                # The pure Python parser raises ValueError and OverflowError for bad escapes and directives.
                raise _syntax_error(text, error) from error
        if data is None:
            raise _UnusableError(0, "the file is empty", 'Begin with version: "1.0" and a provider: section')
        if not isinstance(data, dict):
            raise _UnusableError(self.lines[()], "the file is not a mapping", 'Begin with version: "1.0"')
        return data

    def _document(self) -> Any:
        data = None
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.NodeEvent):
                data = self._node(event, ())
            elif isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    what = "the file has a second document"
                    raise _UnusableError(_line(event), what, "Keep one document: remove the line ---")
        return data

    def _node(self, event: yaml.NodeEvent, path: KeyPath) -> Any:
        line = self._counted(event)
        self.lines.setdefault(path, line)
        if isinstance(event, yaml.AliasEvent):
            self.complain(line, f"the alias *{event.anchor} is not supported", "Write the value out")
            return INVALID
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path, line)
        self._refuse_tag(event, line)
        if len(path) == MAX_DEPTH:
            what = f"values are nested more than {MAX_DEPTH} deep"
            raise _UnusableError(line, what, "Make the structure flatter")
        return self._mapping(path) if isinstance(event, yaml.MappingStartEvent) else self._list(path)

    def _list(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        for event in self._until_end():
            items.append(self._node(event, (*path, len(items))))
        return items

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        items: dict[str, Any] = {}
        for event in self._until_end():
            key, keep = self._key(event, path, items)
            value = self._node(next(self._events), (*path, key))
            if keep:
                items[key] = value
        return items

    def _until_end(self) -> Iterator[Any]:
        """The first event of each entry of an open collection. The caller reads the further events of the entry."""
        while not isinstance(event := next(self._events), yaml.CollectionEndEvent):
            yield event

    def _key(self, event: yaml.NodeEvent, path: KeyPath, items: dict[str, Any]) -> tuple[str, bool]:
        """Return a key, and whether its value belongs to the mapping."""
        line = self._counted(event)
        if not isinstance(event, yaml.ScalarEvent):
            raise _UnusableError(line, "a key is not a scalar", "Write each key as a word before a colon")
        self._check_scalar(event, line)
        key: str = event.value
        if key == "<<" and event.implicit[0]:
            self.complain(line, "merge keys (<<) are not supported", "Write the merged keys out")
        elif key in items:
            what = f"duplicate key {key!r}, first defined in line {self.lines[*path, key]}"
            self.complain(line, what, "Remove one of the two")
        else:
            self.lines[*path, key] = line
            return key, True
        return key, False

    def _counted(self, event: yaml.NodeEvent) -> int:
        """Count a value or key; returns its line."""
        self._values += 1
        if self._values > MAX_VALUES:
            what = f"the file has more than {MAX_VALUES} values"
            raise _UnusableError(_line(event), what, "Remove unused sections")
        return _line(event)

    def _scalar(self, event: yaml.ScalarEvent, path: KeyPath, line: int) -> Any:
        if not self._check_scalar(event, line):
            return INVALID
        value = _plain_value(event.value) if event.implicit[0] else event.value
        if isinstance(value, float) and not math.isfinite(value):
            self.complain(line, f"{event.value[:40]} is not a finite number", "Write a number, or quote a text")
            return INVALID
        if isinstance(value, int | float):
            self.written.setdefault(path, event.value)
        return value

    def _check_scalar(self, event: yaml.ScalarEvent, line: int) -> bool:
        if re.search(_UNUSABLE, event.value):
            self.complain(line, "a text contains a NUL or an unpaired surrogate", "Remove that escape")
            return False
        return self._refuse_tag(event, line)

    def _refuse_tag(self, event: Any, line: int) -> bool:
        if event.tag is None:
            return True
        self.complain(line, f"the tag {event.tag[:60]} is not supported", "Remove it; quote the value if it is text")
        return False


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def _plain_value(text: str) -> str | int | float | bool | None:
    """Return the value of a plain scalar by the YAML 1.2 core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if re.fullmatch(_DECIMAL, text):
        return int(text)
    if re.fullmatch(_PREFIXED, text):
        return int(text, 0)
    if re.fullmatch(_FLOAT, text):
        return float(text)
    if re.fullmatch(_NOT_FINITE, text):
        return math.nan
    return text
