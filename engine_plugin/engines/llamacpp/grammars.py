"""How much a request's grammars may ask of llama.cpp, which computes them on the thread that all its calls share.

The bounds were measured with llama.cpp b11549 on one core: an enum of 1,000 values holds up the other calls for 0.2
s, one of 10,000 for 10 s, and 2,000 optional properties are converted for 40 s.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["check_grammars"]

_ALTERNATIVES = 1000
_PROPERTIES = 500
_SCHEMAS = 5000
_TEXT = 256 * 1024
_EXPANDED = 20_000
_REPEATED = re.compile(r"\{(\d{0,9})(?:,(\d{0,9}))?\}")


def check_grammars(request: Mapping[str, Any]) -> None:
    """Raise InvalidRequestError, naming the field, for a schema or grammar that would block other calls."""
    count = _Count()
    for field, schema in _schemas(request):
        count.add(field, schema)
    grammar = request.get("grammar")
    if isinstance(grammar, str):
        _require("grammar", "characters", len(grammar), _TEXT)
        _require("grammar", "alternatives", grammar.count("|") + 1, _ALTERNATIVES)
        _require("grammar", "steps, its repetitions written out,", _expanded(grammar), max(_EXPANDED, len(grammar)))


def _schemas(request: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    form = request.get("response_format")
    if isinstance(form, dict):
        yield "response_format", {key: form[key] for key in ("json_schema", "schema") if key in form}
    yield "json_schema", request.get("json_schema")
    tools = request.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        function = tool.get("function") if isinstance(tool, dict) else None
        if isinstance(function, dict):
            yield f"tools[{index}].function.parameters", function.get("parameters")


class _Count:
    """What all schemas of a request ask for together."""

    def __init__(self) -> None:
        self._alternatives = 0
        self._schemas = 0
        self._characters = 0

    def add(self, field: str, schema: Any) -> None:
        """Raises InvalidRequestError when that is too much."""
        if not isinstance(schema, dict):
            return
        self._characters += len(json.dumps(schema, ensure_ascii=False))
        _require(field, "characters", self._characters, _TEXT)
        waiting: list[Any] = [schema]
        while waiting:
            one = waiting.pop()
            if isinstance(one, list):
                waiting += one
            elif isinstance(one, dict):
                self._see(field, one)
                waiting += one.values()

    def _see(self, field: str, schema: dict[str, Any]) -> None:
        self._schemas += 1
        _require(field, "schemas", self._schemas, _SCHEMAS)
        choices = [schema[key] for key in ("enum", "anyOf", "oneOf") if isinstance(schema.get(key), list)]
        self._alternatives += sum(map(len, choices))
        _require(field, "values in enum, anyOf and oneOf", self._alternatives, _ALTERNATIVES)
        properties = schema.get("properties")
        if isinstance(properties, dict):
            _require(field, "properties of one object", len(properties), _PROPERTIES)
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            _require(f"{field}: pattern", "steps, its repetitions written out,", _expanded(pattern), _EXPANDED)


def _require(field: str, what: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidRequestError(
            f"{field}: {count} {what} would block the model's other calls; at most {most} are allowed"
        )


def _expanded(pattern: str) -> int:
    """About how many characters a regular expression or grammar has when its counted repetitions are written out."""
    totals, last, at = [0], 0, 0
    while at < len(pattern):
        repeated = _REPEATED.match(pattern, at)
        if repeated is not None and last:
            times = int(repeated[2] or repeated[1] or 1)
            totals[-1] += last * max(times - 1, 0)
            at = repeated.end()
            continue
        character = pattern[at]
        if character == "(":
            totals.append(0)
        elif character == ")" and len(totals) > 1:
            last = totals.pop() + 1
            totals[-1] += last
        else:
            last = 1
            totals[-1] += 1
        at += 2 if character == "\\" else 1
    return sum(totals)
