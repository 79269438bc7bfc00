"""Typed reading of one mapping of a manifest, with a problem for each invalid value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from engine_plugin.manifest.document import INVALID

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from engine_plugin.errors import Problem
    from engine_plugin.manifest.document import KeyPath, Source

__all__ = ["Section", "did_you_mean", "dotted", "near", "quoted"]

_T = TypeVar("_T")

_LONGEST_NAME = 40
_INT32 = 2**31 - 1


def dotted(path: KeyPath) -> str:
    """Format a path, such as services[0].timeout."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(steps).removeprefix(".") or "the file"


def quoted(value: object) -> str:
    """Quote a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def near(name: str, known: Collection[str]) -> str:
    """Return the known name that is most similar to `name`, or ""."""
    if not known or len(name) > _LONGEST_NAME:
        return ""
    from difflib import get_close_matches  # imported only for an invalid manifest

    plain = "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")
    for attempt in (name, name.lower(), name.upper(), plain.replace("-", "_"), plain.replace("_", "-")):
        if found := get_close_matches(attempt, known, 1, 0.8):
            return found[0]
    return ""


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return the beginning of a fix for an unknown name: a question, or "" if nothing is similar."""
    meant = near(name, known)
    return f"Did you mean {meant}? " if meant else ""


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

    def __init__(
        self,
        source: Source,
        problems: list[Problem],
        path: KeyPath,
        data: Mapping[str, Any],
        known: Collection[str] = (),
    ) -> None:
        """With `known` keys, warn about unknown ones that are similar, because a host ignores unknown keys."""
        self.source = source
        self.problems = problems
        self.path = path
        self.data = data
        for key in data:
            if key not in known and (meant := near(key, known)) and meant not in data:
                self.complain((key,), "is not a known key", f"Did you mean {meant}?", "warning")

    def complain(self, where: KeyPath, what: str, fix: str, severity: str = "error") -> None:
        """Report a problem at `where` in this section, () for the section itself; `what` follows its name."""
        path = (*self.path, *where)
        self.problems.append(self.source.problem(path, f"{dotted(path)} {what}", fix, severity))

    def text(self, key: str, default: str = "", *, required: bool = False) -> str:
        """Read a text; `default` if it is empty or absent."""
        value = self.data.get(key)
        if value is None or (isinstance(value, str) and not value.strip()):
            if required:
                self._complain_of_absence(key, f"Add {key}: and its value")
            return default
        written = self.source.written.get((*self.path, key), "")
        fix = "Write one text" if isinstance(value, (dict, list)) else f'Write it in quotes: {key}: "{written}"'
        return self._value(key, str, "a text", fix) or default

    def choice(self, key: str, choices: Collection[str], default: str = "", *, required: bool = False) -> str:
        """Read one of a few texts."""
        value = self.text(key, default, required=required)
        if value == default or value in choices:
            return value
        fix = f"{did_you_mean(value, choices)}It must be one of: {', '.join(choices)}"
        self.complain((key,), f"is {quoted(value)}", fix)
        return default

    def flag(self, key: str) -> bool:
        """Read a boolean; false if it is absent."""
        return self._value(key, bool, "a boolean", "Write true or false, without quotes") or False

    def integer(self, key: str) -> int:
        """Read a 32-bit integer; 0 if it is absent."""
        value = self._value(key, int, "an integer", "Write an integer, without quotes") or 0
        if abs(value) > _INT32:
            self.complain((key,), f"is {value}, which is too large", f"Write a number up to {_INT32}")
            return 0
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Read a list of texts; empty if it is absent."""
        values = self._value(key, list, "a list", f"Write it as a list: {key}: [first, second]") or []
        for index, item in enumerate(values):
            if item is not INVALID and not (isinstance(item, str) and item):
                self.complain((key, index), f"is {_kind(item)}, not a text", "Write it in quotes, or remove it")
        return tuple(item for item in values if isinstance(item, str))

    def section(self, key: str, known: Collection[str] = (), *, required: bool = False) -> Section:
        """Read a mapping with `known` keys; empty if it is absent."""
        if required and self.data.get(key) in (None, {}):
            self._complain_of_absence(key, f"Add the section {key}:")
        data = self._value(key, dict, "a mapping", f"Write its keys, indented, below {key}:") or {}
        return self._inner((key,), data, known)

    def sections(self, key: str, known: Collection[str]) -> list[Section]:
        """Read a list of mappings with `known` keys; empty if it is absent."""
        values = self._value(key, list, "a list", "Begin each entry with a dash") or []
        for index, item in enumerate(values):
            if item is not INVALID and not isinstance(item, dict):
                self.complain((key, index), f"is {_kind(item)}, not a mapping", "Write its keys after the dash")
        return [self._inner((key, index), item, known) for index, item in enumerate(values) if isinstance(item, dict)]

    def _inner(self, where: KeyPath, data: Mapping[str, Any], known: Collection[str]) -> Section:
        return Section(self.source, self.problems, (*self.path, *where), data, known)

    def _value(self, key: str, kind: type[_T], name: str, fix: str) -> _T | None:
        """The value at `key`; None if it is absent. A value of another kind is a problem, and None."""
        value = self.data.get(key)
        if value is None or value is INVALID:
            return None
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        written = self.source.written.get((*self.path, key), "")
        self.complain((key,), f"is {_kind(value, written)}, not {name}", fix)
        return None

    def _complain_of_absence(self, key: str, fix: str) -> None:
        self.complain((key,), "is missing" if key not in self.data else "is empty", fix)
