"""The surgery on a manifest's text: a few characters put where a YAML parser says that the places are.

They are in the writing of what stands around them: indentation, line ends, quotes. Called by `edit`, which reads the
new text again before it takes the file's place.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DEFAULT", "LIST", "Surgeon", "UnforeseenError", "plain_or_quoted"]

DEFAULT = "default_model"
LIST = "support_models"
"""The keys of a service that are set."""

_BEFORE: Final = ("service_name", "task_type", "protocol", "expose_protocol", "endpoint", "auth_type")
"""The keys that stand before default_model in the manifests that we ship; a new one goes below the last of them."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_REST = re.compile(r"[ \t]*(,?)[ \t]*(#.*)?")
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._/+-]*(?::[A-Za-z0-9][A-Za-z0-9._/+-]*)*")
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
"""Plain words that some reader of YAML takes for something else than a text."""
_ESCAPED = re.compile("[^\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]|[\u2028\u2029]")


class UnforeseenError(Exception):
    """The file's style is none that can be changed here."""


def plain_or_quoted(name: str) -> str:
    """A name as a manifest may have it: as it is, or in double quotes where YAML would take it for something else."""
    plain = _PLAIN.fullmatch(name) and name.lower() not in _WORDS
    return name if plain else _double_quoted(name)


def _double_quoted(name: str) -> str:
    """A text in JSON, with escapes for what YAML does not let stand; JSON's pairs of surrogates YAML cannot read."""
    inner = json.dumps(name, ensure_ascii=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", inner)


@dataclass(frozen=True, slots=True)
class _Cut:
    """What stands from `start` to `end` becomes `text`. Of two at one place the first comes first."""

    start: int
    end: int
    text: str


class Surgeon:
    """Finds the places in one text, and puts the new pieces there. Made for one operation."""

    def __init__(self, text: str, *, as_json: bool) -> None:
        self._text = text
        self._as_json = as_json
        self._break = _BREAK.search(text)
        self._cuts: list[_Cut] = []

    def operate(self, data: Any, models: Mapping[str, str]) -> str:
        """The text that says `models`. Raises UnforeseenError, yaml.YAMLError."""
        root = yaml.compose(self._text, Loader=_LOADER)  # the nesting is known to be small by now
        services = dict(_entries(root))["services"]
        for entry, node in zip(data["services"], services.value, strict=True):
            model = models.get(entry["service_name"])
            if model is None:
                continue
            self._set(node, entry, model)
            if entry.get(LIST) and model not in entry[LIST]:
                self._append(dict(_entries(node))[LIST], model)
        text = self._text
        for _, cut in sorted(enumerate(self._cuts), key=lambda cut: (cut[1].start, cut[0]), reverse=True):
            text = text[: cut.start] + cut.text + text[cut.end :]
        return text

    def _set(self, mapping: Any, entry: Mapping[str, Any], model: str) -> None:
        """Give one service its default model."""
        value = dict(_entries(mapping)).get(DEFAULT)
        if value is None:
            self._insert(mapping, model)
        elif entry[DEFAULT] != model:
            start, end = self._span(value)
            if value.style in ("|", ">") and "#" in self._text[start:end].splitlines()[0]:
                raise UnforeseenError  # a comment in the midst of the value
            new = self._scalar(model, value.style, flow=mapping.flow_style)
            if start == end:  # no value: what stands there ends with the colon
                colon = self._text[:start].endswith(":")
                new = f" {new}" if colon else f": {new}"
            self._cuts.append(_Cut(start, end, new))

    def _insert(self, mapping: Any, model: str) -> None:
        """Add the key, below the last of those that come before it."""
        pairs = [(key, value) for key, value in mapping.value if key.value in _BEFORE]
        key, value = max(pairs, key=lambda pair: _BEFORE.index(pair[0].value))
        name = self._scalar(DEFAULT, key.style, flow=mapping.flow_style)
        between = self._text[key.end_mark.index : value.start_mark.index]
        colon = between if re.fullmatch(r"[ \t]*:[ \t]+|:", between) and value.value else ": "
        line = f"{name}{colon}{self._scalar(model, value.style, flow=mapping.flow_style)}"
        if mapping.flow_style:
            self._add_in_flow(key, value, line)
        else:
            self._add_line(value, key.start_mark.column, line)

    def _append(self, sequence: Any, model: str) -> None:
        """Add an item to the end of a list."""
        last = sequence.value[-1]
        item = self._scalar(model, last.style, flow=sequence.flow_style)
        if sequence.flow_style:
            self._add_in_flow(last, last, item)
            return
        before = self._text[: last.start_mark.index]
        dash = len(before.rstrip()) - 1
        column = dash - self._line_start(dash)
        gap = before[dash + 1 :] if not _BREAK.search(before, dash) else " "
        self._add_line(last, column, f"-{gap}{item}")

    def _add_line(self, above: Any, column: int, line: str) -> None:
        """Put a line of its own below the one on which the node `above` ends."""
        at = self._line_end(self._span(above)[1])
        self._cuts.append(_Cut(at, at, f"{self._break_at(at)}{' ' * column}{line}"))

    def _add_in_flow(self, first: Any, last: Any, entry: str) -> None:
        """Put an entry behind that of the nodes `first` to `last`: on a line of its own when that has one."""
        start, end = first.start_mark.index, self._span(last)[1]
        line_start, line_end = self._line_start(start), self._line_end(end)
        indentation = self._text[line_start:start]
        rest = _REST.fullmatch(self._text, end, line_end)
        if indentation.strip() or rest is None or (line_end == len(self._text)):
            self._cuts.append(_Cut(end, end, f", {entry}"))
            return
        if not rest[1]:
            self._cuts.append(_Cut(end, end, ","))
        self._cuts.append(_Cut(line_end, line_end, f"{self._break_at(line_end)}{indentation}{entry}{rest[1]}"))

    def _scalar(self, text: str, style: str | None, *, flow: bool) -> str:
        """A text written like its neighbour: plain or in single or double quotes, as far as it can be."""
        if self._as_json or style == '"':
            return _double_quoted(text)
        plain = plain_or_quoted(text)
        if plain.startswith('"') or (flow and ":" in text):
            return _double_quoted(text)
        return f"'{plain}'" if style == "'" else plain

    def _span(self, node: Any) -> tuple[int, int]:
        """Where a scalar stands, without what follows it: the parser counts line breaks to a text in a block."""
        start, end = node.start_mark.index, node.end_mark.index
        return start, start + len(self._text[start:end].rstrip())

    def _line_start(self, at: int) -> int:
        starts = [found.end() for found in _BREAK.finditer(self._text, 0, at)]
        return starts[-1] if starts else 0

    def _line_end(self, at: int) -> int:
        found = _BREAK.search(self._text, at)
        return found.start() if found else len(self._text)

    def _break_at(self, at: int) -> str:
        """The line's own break; on the last line, which has none, the first of the file."""
        found = _BREAK.match(self._text, at) or self._break
        return found[0] if found and found[0].strip("\x85\u2028\u2029") else "\n"


def _entries(mapping: Any) -> list[tuple[str, Any]]:
    """The pairs of a mapping node, with their keys as text."""
    return [(key.value, value) for key, value in mapping.value]
