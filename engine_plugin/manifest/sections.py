"""Typed reading of one mapping of a manifest, with a problem for each invalid value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_plugin.manifest.document import INVALID

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from engine_plugin.errors import Problem
    from engine_plugin.manifest.document import KeyPath, Source

__all__ = ["Section", "near", "quoted"]

_LONGEST_NAME = 40
_INT32 = 2**31 - 1


def _dotted(path: KeyPath) -> str:
    """Format a path, such as services[0].timeout."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the file"


def quoted(value: object) -> str:
    """Quote a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def near(name: str, known: Collection[str]) -> str:
    """Return the known name that is most similar to `name`, or ""."""
    if len(name) > _LONGEST_NAME:
        return ""
    from difflib import get_close_matches  # imported only for an invalid manifest

    plain = "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")
    for attempt in (name, name.lower(), name.upper(), plain.replace("-", "_"), plain.replace("_", "-")):
        if found := get_close_matches(attempt, known, 1, 0.8):
            return found[0]
    return ""


def _kind(value: object, written: str = "") -> str:
    """Describe a value in words; `written` is the text of a number or boolean in the file."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return f"the boolean {written or str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {written or value}"
    return "empty" if value is None else f"the text {quoted(value)}"


class Section:
    """A mapping. Every reader returns a usable value and reports a problem for an invalid one."""

    def __init__(self, source: Source, problems: list[Problem], path: KeyPath, data: Mapping[str, Any]) -> None:
        self.source = source
        self.problems = problems
        self.path = path
        self.data = data

    def complain(self, where: KeyPath, what: str, fix: str, severity: str = "error") -> None:
        """Report a problem at `where` in this section, () for the section itself; `what` follows its name."""
        path = (*self.path, *where)
        self.problems.append(self.source.problem(path, f"{_dotted(path)} {what}", fix, severity))

    def warn_near_misses(self, known: Collection[str]) -> None:
        """Warn about unknown keys that are similar to known ones, because a host ignores unknown keys."""
        for key in self.data:
            if key not in known and (meant := near(key, known)) and meant not in self.data:
                self.complain((key,), "is not a known key", f"Did you mean {meant}?", "warning")

    def text(self, key: str, default: str = "", *, required: bool = False) -> str:
        """Read a text; `default` if it is empty or absent."""
        value = self.data.get(key)
        if value is INVALID:
            return default
        if value is None or (isinstance(value, str) and not value.strip()):
            if required:
                self.complain(
                    (key,), "is missing" if key not in self.data else "is empty", f"Add {key}: and its value"
                )
            return default
        if not isinstance(value, str):
            scalar = not isinstance(value, (dict, list))
            written = self.source.written.get((*self.path, key), "")
            fix = f'Write it in quotes: {key}: "{written}"' if scalar else "Write one text"
            self.complain((key,), f"is {_kind(value, written)}, not a text", fix)
            return default
        return value

    def choice(self, key: str, choices: Collection[str], default: str = "", *, required: bool = False) -> str:
        """Read one of a few texts."""
        value = self.text(key, default, required=required)
        if value == default or value in choices:
            return value
        meant = near(value, choices)
        hint = f"Did you mean {meant}? " if meant else ""
        self.complain((key,), f"is {quoted(value)}", f"{hint}It must be one of: {', '.join(choices)}")
        return default

    def flag(self, key: str) -> bool:
        """Read a boolean; false if it is absent."""
        value = self.data.get(key)
        if value is None or value is INVALID or isinstance(value, bool):
            return value is True
        self.complain((key,), f"is {_kind(value)}, not a boolean", "Write true or false, without quotes")
        return False

    def integer(self, key: str) -> int:
        """Read a 32-bit integer; 0 if it is absent."""
        value = self.data.get(key)
        if value is None or value is INVALID:
            return 0
        if isinstance(value, bool) or not isinstance(value, int):
            self.complain((key,), f"is {_kind(value)}, not an integer", "Write an integer, without quotes")
            return 0
        if abs(value) > _INT32:
            self.complain((key,), f"is {value}, which is too large", f"Write a number up to {_INT32}")
            return 0
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Read a list of texts; empty if it is absent."""
        value = self.data.get(key)
        if value is None or value is INVALID:
            return ()
        if not isinstance(value, list):
            self.complain((key,), f"is {_kind(value)}, not a list", f"Write it as a list: {key}: [first, second]")
            return ()
        for index, item in enumerate(value):
            if item is not INVALID and not (isinstance(item, str) and item):
                self.complain((key, index), f"is {_kind(item)}, not a text", "Write it in quotes, or remove it")
        return tuple(item for item in value if isinstance(item, str))

    def section(self, key: str, *, required: bool = False) -> Section:
        """Read a mapping; empty if it is absent."""
        value = self.data.get(key)
        if required and (value is None or value == {}):
            self.complain((key,), "is missing" if key not in self.data else "is empty", f"Add the section {key}:")
        elif value is not None and value is not INVALID and not isinstance(value, dict):
            self.complain((key,), f"is {_kind(value)}, not a mapping", f"Write its keys, indented, below {key}:")
        return Section(self.source, self.problems, (*self.path, key), value if isinstance(value, dict) else {})

    def sections(self, key: str) -> list[Section]:
        """Read a list of mappings; empty if it is absent."""
        value = self.data.get(key)
        if value is None or value is INVALID:
            return []
        if not isinstance(value, list):
            self.complain((key,), f"is {_kind(value)}, not a list", "Begin each entry with a dash")
            return []
        for index, item in enumerate(value):
            if item is not INVALID and not isinstance(item, dict):
                self.complain((key, index), f"is {_kind(item)}, not a mapping", "Write its keys after the dash")
        return [
            Section(self.source, self.problems, (*self.path, key, index), item)
            for index, item in enumerate(value)
            if isinstance(item, dict)
        ]
