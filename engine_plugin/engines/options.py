"""An engine's own settings: a dataclass read from the `engine:` section of plugin.yaml, complaints with lines."""

from __future__ import annotations

import dataclasses
import difflib
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from engine_plugin.errors import ManifestError, Problem

if TYPE_CHECKING:
    from engine_plugin.manifest import Manifest

__all__ = ["option_problems", "read_options"]

Options = TypeVar("Options")

_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def option_problems(cls: type[Any], manifest: Manifest) -> list[Problem]:
    """What is wrong with the `engine:` section for an engine whose options are the dataclass `cls`.

    A field is a str, int, float or bool, or one of these and None; its metadata may hold `min`, `max` and
    `choices`. One without a default must be given. Called by `read_options` and by lint.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = get_type_hints(cls)
    problems = []
    for key, value in manifest.engine_options.items():
        field = fields.get(key)
        if field is None:
            near = difflib.get_close_matches(str(key), fields, n=1)
            fix = f"Did you mean {near[0]!r}?" if near else f"Known options: {', '.join(fields)}."
            problems.append(manifest.problem(("engine", key), f"engine.{key} is not an option of this engine", fix))
            continue
        complaint = _complaint(hints[key], field.metadata, value)
        if complaint:
            what = f"engine.{key} is {value!r}"
            problems.append(manifest.problem(("engine", key), what, f"It must be {complaint}."))
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in manifest.engine_options:
            what = f"engine.{key} is missing"
            problems.append(manifest.problem(("engine",), what, f"Give it {_NAMES[_kinds(hints[key])[0]]}."))
    return problems


def _kinds(hint: Any) -> tuple[type[Any], ...]:
    """The types of a field: one, or several for `int | None`."""
    return get_args(hint) or (hint,)


def _complaint(hint: Any, metadata: Any, value: Any) -> str:
    """What the value must be; "" when it is."""
    kinds = _kinds(hint)
    choices = metadata.get("choices")
    if choices and value not in choices:
        return "one of " + ", ".join(map(str, choices))
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        return _NAMES[kinds[0]]
    if value is None:
        return ""
    low, high = metadata.get("min"), metadata.get("max")
    if low is not None and value < low:
        return f"at least {low}"
    if high is not None and value > high:
        return f"at most {high}"
    return ""


def read_options(cls: type[Options], manifest: Manifest) -> Options:
    """The `engine:` section as `cls`. Raises ManifestError with every problem."""
    problems = option_problems(cls, manifest)
    if problems:
        raise ManifestError(problems)
    return cls(**manifest.engine_options)
