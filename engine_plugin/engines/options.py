"""Reads an engine's options from the `engine:` section of plugin.yaml into a dataclass; errors name the line.

A section whose keys the plugin only passes on is a mapping: its keys stand in a table (`Key`, `section`).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from engine_plugin.errors import ManifestError, Problem
from engine_plugin.manifest.sections import dotted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine_plugin.manifest import Manifest
    from engine_plugin.manifest.document import KeyPath

__all__ = ["Key", "Kind", "Table", "keys_of", "number", "option_problems", "read_options", "section"]

Options = TypeVar("Options")

Kind: TypeAlias = "type[Any] | Table"

_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class Key(NamedTuple):
    """One key of a section. `hint` is a type as a field has it, a `Table` (a section), or a list of one (a list of
    mappings). A key without a default has None; one that must be given has MISSING of dataclasses."""

    hint: Any
    default: Any = None
    metadata: Mapping[str, Any] = {}


Table: TypeAlias = Mapping[str, Key]


def section(table: Table) -> Any:
    """A field for a section that is passed on: a dict of the values that were given and of the table's defaults."""
    return dataclasses.field(default_factory=lambda: _made(table, {}), metadata={"table": table})


def number(default: Any, low: float, high: float) -> Any:
    """A field with a default and bounds."""
    return dataclasses.field(default=default, metadata={"min": low, "max": high})


def option_problems(cls: type[Any], manifest: Manifest) -> list[Problem]:
    """The problems of the `engine:` section for an engine whose options are the dataclass `cls`.

    A field is a str, int, float or bool, or one of these and None; another such dataclass (and None) or a `section`,
    for a section; a `tuple[Other, ...]` of one, for a list of mappings; or a `tuple[str, ...]`, for a list of texts.
    Its metadata may hold `min`, `max`, `choices`, and, for a text that is not empty, `pattern` or `valid` (raises
    ValueError) with its `form` in words. One without a default must be given. Called by `read_options` and by lint.
    """
    return list(_problems(cls, manifest.engine_options, ("engine",), manifest))


def keys_of(kind: Kind) -> Table:
    """The keys of a section, which is a dataclass or a table."""
    if not isinstance(kind, type):
        return kind
    hints = get_type_hints(kind)
    return {
        field.name: Key(
            field.metadata.get("table", hints[field.name]),
            field.default if field.default is not dataclasses.MISSING else field.default_factory,
            field.metadata,
        )
        for field in dataclasses.fields(kind)
        if field.init
    }


def _problems(kind: Kind, given: Mapping[str, Any], place: KeyPath, manifest: Manifest) -> Iterator[Problem]:
    keys = keys_of(kind)
    for name, value in given.items():
        key, here = keys.get(name), (*place, name)
        if key is None:
            near = difflib.get_close_matches(str(name), keys, n=1)
            fix = f"Did you mean {near[0]!r}?" if near else f"Known options: {', '.join(keys)}."
            yield manifest.problem(here, f"{dotted(here)} is not an option of this engine", fix)
        else:
            yield from _value_problems(key.hint, key.metadata, value, here, manifest)
    for name, key in keys.items():
        if key.default is dataclasses.MISSING and name not in given:
            what = f"{dotted((*place, name))} is missing"
            yield manifest.problem(place, what, f"Give it {_NAMES[_kinds(key.hint)[0]]}.")


def _value_problems(
    hint: Any, metadata: Mapping[str, Any], value: Any, place: KeyPath, manifest: Manifest
) -> Iterator[Problem]:
    entry, kind = _listed(hint), _section(hint)
    if entry is not None and isinstance(value, list):
        for index, one in enumerate(value):
            yield from _value_problems(entry, metadata, one, (*place, index), manifest)
        return
    if kind is not None and isinstance(value, dict):
        yield from _problems(kind, value, place, manifest)
        return
    if entry is not None:
        complaint = f"a list of {'texts' if entry is str else 'mappings'}"
    else:
        complaint = "a mapping" if kind is not None else _complaint(hint, metadata, value)
    if complaint:
        yield manifest.problem(place, f"{dotted(place)} is {value!r}", f"It must be {complaint}.")


def _listed(hint: Any) -> Any:
    """The hint of the entries of a list; None for no list."""
    if isinstance(hint, list):
        return hint[0]
    return get_args(hint)[0] if get_origin(hint) is tuple else None


def _section(hint: Any) -> Kind | None:
    """A table, or the dataclass of a field that is one, or one and None."""
    if isinstance(hint, Mapping):
        return hint
    return next((kind for kind in _kinds(hint) if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def _kinds(hint: Any) -> tuple[type[Any], ...]:
    """The types of a field: one, or several for `int | None`."""
    return get_args(hint) or (hint,)


def _complaint(hint: Any, metadata: Mapping[str, Any], value: Any) -> str:
    """What the value must be; "" if it is valid."""
    kinds = _kinds(hint)
    choices = metadata.get("choices")
    if choices and value not in choices:
        return "one of " + ", ".join(str(choice) or "nothing" for choice in choices)
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        return _NAMES[kinds[0]]
    if value is None:
        return ""
    if isinstance(value, str):
        return _misfit(metadata, value)
    low, high = metadata.get("min"), metadata.get("max")
    if low is not None and value < low:
        return f"at least {low}"
    if high is not None and value > high:
        return f"at most {high}"
    return ""


def _misfit(metadata: Mapping[str, Any], value: str) -> str:
    pattern, valid = metadata.get("pattern"), metadata.get("valid")
    try:
        if value and valid:
            valid(value)
        fits = not value or not pattern or bool(re.fullmatch(pattern, value))
    except ValueError:
        fits = False
    return "" if fits else str(metadata["form"])


def read_options(cls: type[Options], manifest: Manifest) -> Options:
    """The `engine:` section as `cls`. Raises ManifestError with every problem."""
    problems = option_problems(cls, manifest)
    if problems:
        raise ManifestError(problems)
    made: Options = _made(cls, manifest.engine_options)
    return made


def _made(kind: Kind, given: Mapping[str, Any]) -> Any:
    """The dataclass; or a table's dict, in which None and empty texts are left out."""
    keys = keys_of(kind)
    found = {name: _read(keys[name].hint, value) for name, value in given.items()}
    if isinstance(kind, type):
        return kind(**found)
    values = {name: found.get(name, key.default) for name, key in keys.items()}
    return {name: value for name, value in values.items() if value is not None and value != ""}


def _read(hint: Any, value: Any) -> Any:
    if (entry := _listed(hint)) is not None:
        return tuple(_read(entry, one) for one in value)
    kind = _section(hint)
    return value if kind is None else _made(kind, value)
