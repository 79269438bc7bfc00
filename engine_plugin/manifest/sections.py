"""Typed reading of one mapping of a manifest, with a complaint for whatever is wrong in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_plugin.manifest.document import INVALID

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from engine_plugin.errors import Problem
    from engine_plugin.manifest.document import KeyPath, Source

__all__ = ["Section", "dotted", "near", "quoted"]

_LONGEST_NAME = 40
_INT32 = 2**31 - 1


def dotted(path: KeyPath) -> str:
    """A path as people write it: services[0].timeout."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the file"


def quoted(value: object) -> str:
    """A value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def near(name: str, known: Collection[str]) -> str:
    """The known name that `name` was probably meant to be, or ""."""
    if len(name) > _LONGEST_NAME:
        return ""
    from difflib import get_close_matches  # only a wrong manifest pays for it

    plain = "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")
    for attempt in (name, name.lower(), name.upper(), plain.replace("-", "_"), plain.replace("_", "-")):
        if found := get_close_matches(attempt, known, 1, 0.8):
            return found[0]
    return ""


def _kind(value: object, written: str = "") -> str:
    """What a value is, in words; `written` is the text of a number or boolean in the file."""
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
    """One mapping. Every reader returns something usable and complains about what it could not use."""

    def __init__(self, source: Source, problems: list[Problem], path: KeyPath, data: Mapping[str, Any]) -> None:
        self.source = source
        self.problems = problems
        self.path = path
        self.data = data

    def complain(self, where: KeyPath, what: str, fix: str, severity: str = "error") -> None:
        """Complain about what stands at `where` in this section, () being itself; `what` follows its name."""
        path = (*self.path, *where)
        self.problems.append(self.source.problem(path, f"{dotted(path)} {what}", fix, severity))

    def warn_near_misses(self, known: Collection[str]) -> None:
        """Warn about unknown keys that look like known ones. A host ignores unknown keys silently."""
        for key in self.data:
            if key not in known and (meant := near(key, known)) and meant not in self.data:
                self.complain((key,), "is not a key that anybody reads", f"Did you mean {meant}?", "warning")

    def text(self, key: str, default: str = "", *, required: bool = False) -> str:
        """A text; empty or absent gives `default`."""
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
        """A text out of a few."""
        value = self.text(key, default, required=required)
        if value == default or value in choices:
            return value
        meant = near(value, choices)
        hint = f"Did you mean {meant}? " if meant else ""
        self.complain((key,), f"is {quoted(value)}", f"{hint}It must be one of: {', '.join(choices)}")
        return default

    def flag(self, key: str) -> bool:
        """A boolean; absent is false."""
        value = self.data.get(key)
        if value is None or value is INVALID or isinstance(value, bool):
            return value is True
        self.complain((key,), f"is {_kind(value)}, not a boolean", "Write true or false, without quotes")
        return False

    def integer(self, key: str) -> int:
        """A whole number of 32 bits; absent is 0."""
        value = self.data.get(key)
        if value is None or value is INVALID:
            return 0
        if isinstance(value, bool) or not isinstance(value, int):
            self.complain((key,), f"is {_kind(value)}, not an integer", "Write a whole number, without quotes")
            return 0
        if abs(value) > _INT32:
            self.complain((key,), f"is {value}, which is too large", f"Write a number up to {_INT32}")
            return 0
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; absent is empty."""
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
        """A mapping; absent is empty."""
        value = self.data.get(key)
        if required and (value is None or value == {}):
            self.complain((key,), "is missing" if key not in self.data else "is empty", f"Add the section {key}:")
        elif value is not None and value is not INVALID and not isinstance(value, dict):
            self.complain((key,), f"is {_kind(value)}, not a mapping", f"Put its keys, indented, below {key}:")
        return Section(self.source, self.problems, (*self.path, key), value if isinstance(value, dict) else {})

    def sections(self, key: str) -> list[Section]:
        """A list of mappings; absent is empty."""
        value = self.data.get(key)
        if value is None or value is INVALID:
            return []
        if not isinstance(value, list):
            self.complain((key,), f"is {_kind(value)}, not a list", "Begin each entry with a dash")
            return []
        for index, item in enumerate(value):
            if item is not INVALID and not isinstance(item, dict):
                self.complain((key, index), f"is {_kind(item)}, not a mapping", "Put its keys behind the dash")
        return [
            Section(self.source, self.problems, (*self.path, key, index), item)
            for index, item in enumerate(value)
            if isinstance(item, dict)
        ]
