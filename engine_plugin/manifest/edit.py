"""A service's default model, set in the text of a plugin.yaml or plugin.json: every other byte stays as it is.

The places come from a YAML parser; the change is a few characters put there, in the writing of what stands around
them (indentation, line ends, quotes). The new text is read again and compared with what it should say before it takes
the file's place, so that a file in an unforeseen style is refused and not spoilt.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import sys
import tempfile
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import yaml

from engine_plugin.errors import PreconditionError, ServiceNotFoundError
from engine_plugin.manifest.document import INVALID, read_document
from engine_plugin.manifest.load import load_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine_plugin.manifest.model import ServiceSpec

__all__ = ["set_default_models"]

_KEY = "default_model"
_LIST = "support_models"
_BEFORE: Final = ("service_name", "task_type", "protocol", "expose_protocol", "endpoint", "auth_type")
"""The keys that stand before default_model in the manifests that we ship; a new one goes below the last of them."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BOM = "\ufeff"
_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_REST = re.compile(r"[ \t]*(,?)[ \t]*(#.*)?")
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._/+-]*(?::[A-Za-z0-9][A-Za-z0-9._/+-]*)*")
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
"""Plain words that some reader of YAML takes for something else than a text."""
_ESCAPED = re.compile("[^\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]|[\u2028\u2029]")


def set_default_models(path: Path, models: Mapping[str, str]) -> tuple[str, ...]:
    """Make each model the default of its service in a manifest, and return the services that were changed by that.

    A list of `support_models` that lacks the model gets it; an empty one stays. The file is replaced as a whole or
    not at all, keeps its permissions, and a link to it stays a link. Blocks. Called by `models use`.

    Raises ManifestError when the file is wrong already, ServiceNotFoundError for one that it does not declare, and
    PreconditionError, saying what to write by hand, when the file cannot be written or changed.
    """
    declared = load_manifest(path).services
    for service in models:
        if service not in declared:
            raise ServiceNotFoundError(f"{path} declares no service {service!r}; it has: {', '.join(declared)}")
    changed = tuple(name for name, model in models.items() if not _says(declared[name], model))
    try:
        _rewrite(Path(os.path.realpath(path)), models)
    except OSError as error:
        _refuse(path, models, error.strerror or str(error))
    except (_UnforeseenError, yaml.YAMLError, ValueError):
        _refuse(path, models, "it is written in a way that this command does not change safely")
    return changed


def _says(spec: ServiceSpec, model: str) -> bool:
    return spec.default_model == model and (not spec.support_models or model in spec.support_models)


class _UnforeseenError(Exception):
    """The file's style is none that can be changed here."""


def _refuse(path: Path, models: Mapping[str, str], why: str) -> NoReturn:
    wanted = ", ".join(f"{_KEY}: {_plain_or_quoted(model)} for {service}" for service, model in models.items())
    raise PreconditionError(f"{path} was not changed: {why}. Write it there yourself: {wanted}.") from None


def _way(file: Path, status: os.stat_result) -> str:
    """How who may not write a file comes to do so."""
    if sys.platform != "win32" and os.geteuid() not in (0, status.st_uid):
        return "it belongs to another user"
    return f"allow it: chmod u+w {shlex.quote(str(file))}"


def _rewrite(file: Path, models: Mapping[str, str]) -> None:
    """Change the real file. Raises OSError, _UnforeseenError, yaml.YAMLError."""
    before = file.read_bytes()
    bom, text = "", before.decode()
    if text.startswith(_BOM):
        bom, text = _BOM, text[1:]
    data = _data_of(file)
    new = _Surgeon(text, as_json=file.suffix == ".json").operate(data, models)
    if new == text:
        return
    status = file.stat()
    if not status.st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) or not os.access(file, os.W_OK):
        raise PermissionError(None, f"it may not be written ({_way(file, status)})")  # a rename would pass over that
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=file.suffix, dir=file.parent)
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write((bom + new).encode())
            stream.flush()
            os.fsync(stream.fileno())
        if _canonical(_data_of(draft)) != _canonical(_expected(data, models)):
            raise _UnforeseenError
        _take_over(status, draft)
        if file.read_bytes() != before:
            raise OSError(None, "somebody else has changed it at the same time; run the command again")
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _take_over(status: os.stat_result, draft: Path) -> None:
    """Give the draft the mode and the owner of the file that it replaces."""
    if os.name == "nt":
        return
    if (status.st_uid, status.st_gid) != (draft.stat().st_uid, draft.stat().st_gid):
        os.chown(draft, status.st_uid, status.st_gid)
    draft.chmod(stat.S_IMODE(status.st_mode))


def _data_of(file: Path) -> Any:
    """What a manifest says, as plain data. Raises _UnforeseenError when it cannot be read."""
    _, data, problems = read_document(file)
    if data is INVALID or problems:
        raise _UnforeseenError
    return data


def _canonical(data: Any) -> str:
    """Data as a text in which 1, 1.0 and true differ."""
    return json.dumps(data, sort_keys=True)


def _expected(data: Any, models: Mapping[str, str]) -> Any:
    """The data as it should be afterwards."""
    after = deepcopy(data)
    for entry in after["services"]:
        model = models.get(entry["service_name"])
        if model is not None:
            entry[_KEY] = model
            if entry.get(_LIST) and model not in entry[_LIST]:
                entry[_LIST].append(model)
    return after


def _plain_or_quoted(name: str) -> str:
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


class _Surgeon:
    """Finds the places in one text, and puts the new pieces there."""

    def __init__(self, text: str, *, as_json: bool) -> None:
        self._text = text
        self._as_json = as_json
        self._break = _BREAK.search(text)
        self._cuts: list[_Cut] = []

    def operate(self, data: Any, models: Mapping[str, str]) -> str:
        """The text that says `models`. Raises _UnforeseenError, yaml.YAMLError."""
        root = yaml.compose(self._text, Loader=_LOADER)  # the nesting is known to be small by now
        services = dict(_entries(root))["services"]
        for entry, node in zip(data["services"], services.value, strict=True):
            model = models.get(entry["service_name"])
            if model is None:
                continue
            self._set(node, entry, model)
            if entry.get(_LIST) and model not in entry[_LIST]:
                self._append(dict(_entries(node))[_LIST], model)
        text = self._text
        for _, cut in sorted(enumerate(self._cuts), key=lambda cut: (cut[1].start, cut[0]), reverse=True):
            text = text[: cut.start] + cut.text + text[cut.end :]
        return text

    def _set(self, mapping: Any, entry: Mapping[str, Any], model: str) -> None:
        """Give one service its default model."""
        value = dict(_entries(mapping)).get(_KEY)
        if value is None:
            self._insert(mapping, model)
        elif entry[_KEY] != model:
            start, end = self._span(value)
            if value.style in ("|", ">") and "#" in self._text[start:end].splitlines()[0]:
                raise _UnforeseenError  # a comment in the midst of the value
            new = self._scalar(model, value.style, flow=mapping.flow_style)
            if start == end:  # no value: what stands there ends with the colon
                colon = self._text[:start].endswith(":")
                new = f" {new}" if colon else f": {new}"
            self._cuts.append(_Cut(start, end, new))

    def _insert(self, mapping: Any, model: str) -> None:
        """Add the key, below the last of those that come before it."""
        pairs = [(key, value) for key, value in mapping.value if key.value in _BEFORE]
        key, value = max(pairs, key=lambda pair: _BEFORE.index(pair[0].value))
        name = self._scalar(_KEY, key.style, flow=mapping.flow_style)
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
        plain = _plain_or_quoted(text)
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
