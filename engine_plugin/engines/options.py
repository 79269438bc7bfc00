"""An engine's own settings: a dataclass read from the `engine:` section of plugin.yaml, complaints with lines."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from engine_plugin.errors import ManifestError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from engine_plugin.manifest import Manifest
    from engine_plugin.manifest.document import KeyPath

__all__ = ["number", "option_problems", "read_options"]

Options = TypeVar("Options")

_TEXTS = tuple[str, ...]
_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def number(default: Any, low: float, high: float) -> Any:
    """A field with a default and bounds."""
    return dataclasses.field(default=default, metadata={"min": low, "max": high})


def option_problems(cls: type[Any], manifest: Manifest) -> list[Problem]:
    """What is wrong with the `engine:` section for an engine whose options are the dataclass `cls`.

    A field is a str, int, float or bool, or one of these and None; another such dataclass (and None), for a section;
    a `tuple[Other, ...]` of one, for a list of mappings; or a `tuple[str, ...]`, for a list of texts. Its metadata
    may hold `min`, `max`, `choices`, and, for a text that is not empty, `pattern` or `valid` (raises ValueError) with
    its `form` in words. One without a default must be given. Called by `read_options` and by lint.
    """
    return list(_problems(cls, manifest.engine_options, ("engine",), manifest))


def _problems(cls: type[Any], given: Mapping[str, Any], place: KeyPath, manifest: Manifest) -> Iterator[Problem]:
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = get_type_hints(cls)
    for key, value in given.items():
        field, here = fields.get(key), (*place, key)
        if field is None:
            near = difflib.get_close_matches(str(key), fields, n=1)
            fix = f"Did you mean {near[0]!r}?" if near else f"Known options: {', '.join(fields)}."
            yield manifest.problem(here, f"{_shown(here)} is not an option of this engine", fix)
        elif inner := _listed(hints[key]):
            yield from _list_problems(inner, value, here, manifest)
        elif inner := _section(hints[key]):
            yield from _section_problems(inner, value, here, manifest)
        elif hints[key] == _TEXTS:
            yield from _text_problems(field.metadata, value, here, manifest)
        elif complaint := _complaint(hints[key], field.metadata, value):
            yield manifest.problem(here, f"{_shown(here)} is {value!r}", f"It must be {complaint}.")
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in given:
            what = f"{_shown((*place, key))} is missing"
            yield manifest.problem(place, what, f"Give it {_NAMES[_kinds(hints[key])[0]]}.")


def _list_problems(cls: type[Any], value: Any, place: KeyPath, manifest: Manifest) -> Iterator[Problem]:
    if not isinstance(value, list):
        yield manifest.problem(place, f"{_shown(place)} is {value!r}", "It must be a list of mappings.")
        return
    for index, entry in enumerate(value):
        yield from _section_problems(cls, entry, (*place, index), manifest)


def _section_problems(cls: type[Any], value: Any, place: KeyPath, manifest: Manifest) -> Iterator[Problem]:
    if isinstance(value, dict):
        yield from _problems(cls, value, place, manifest)
    else:
        yield manifest.problem(place, f"{_shown(place)} is {value!r}", "It must be a mapping.")


def _text_problems(metadata: Mapping[str, Any], value: Any, place: KeyPath, manifest: Manifest) -> Iterator[Problem]:
    if not isinstance(value, list):
        yield manifest.problem(place, f"{_shown(place)} is {value!r}", "It must be a list of texts.")
        return
    for index, entry in enumerate(value):
        if complaint := _complaint(str, metadata, entry):
            here = (*place, index)
            yield manifest.problem(here, f"{_shown(here)} is {entry!r}", f"It must be {complaint}.")


def _shown(place: KeyPath) -> str:
    """A place as the rest of the manifest's complaints show it: `engine.archives[0].url`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return "".join(steps).removeprefix(".")


def _listed(hint: Any) -> type[Any] | None:
    """The dataclass of a `tuple[Other, ...]`."""
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return inner if dataclasses.is_dataclass(inner) and isinstance(inner, type) else None
    return None


def _section(hint: Any) -> type[Any] | None:
    """The dataclass of a field that is one, or one and None."""
    found = next((kind for kind in _kinds(hint) if dataclasses.is_dataclass(kind)), None)
    return found if isinstance(found, type) else None


def _kinds(hint: Any) -> tuple[type[Any], ...]:
    """The types of a field: one, or several for `int | None`."""
    return get_args(hint) or (hint,)


def _complaint(hint: Any, metadata: Mapping[str, Any], value: Any) -> str:
    """What the value must be; "" when it is."""
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
    if not value:
        return ""
    if pattern and not re.fullmatch(pattern, value):
        return str(metadata["form"])
    if valid:
        try:
            valid(value)
        except ValueError:
            return str(metadata["form"])
    return ""


def read_options(cls: type[Options], manifest: Manifest) -> Options:
    """The `engine:` section as `cls`. Raises ManifestError with every problem."""
    problems = option_problems(cls, manifest)
    if problems:
        raise ManifestError(problems)
    return cls(**_values(cls, manifest.engine_options))


def _values(cls: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, each as its field has it."""
    hints = get_type_hints(cls)
    return {key: _read(hints[key], value) for key, value in given.items()}


def _read(hint: Any, value: Any) -> Any:
    if hint == _TEXTS:
        return tuple(value)
    if inner := _listed(hint):
        return tuple(inner(**_values(inner, entry)) for entry in value)
    if inner := _section(hint):
        return inner(**_values(inner, value))
    return value
