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

    A field's metadata may hold `min`, `max` and `choices`. Called by `read_options` and by lint.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
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
    return problems


def _complaint(hint: Any, metadata: Any, value: Any) -> str:
    """What the value must be; "" when it is."""
    choices = metadata.get("choices")
    if choices and value not in choices:
        return "one of " + ", ".join(choices)
    wanted = (int, float) if hint is float else hint
    if not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool):
        return _NAMES[hint if not get_args(hint) else str]
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
