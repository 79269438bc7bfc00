"""Limits of the schemas and grammars of requests, which llama.cpp processes on the thread of all its calls.

The limits were measured with llama.cpp b11549 on one core: an enum of 1,000 values blocks other calls for 0.2 s, one
of 10,000 for 10 s, and converting 2,000 optional properties takes 40 s. llama.cpp follows all alternatives of a
schema or rule at once, also through references, and expands `{5,3}` until the memory is exhausted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["check_grammars"]

_MAX_ALTERNATIVES = 1000
_MAX_PROPERTIES = 500
_MAX_SCHEMAS = 5000
_MAX_CHARACTERS = 256 * 1024
_MAX_EXPANDED = 20_000
_MAX_RULES = 100_000
_RULE = re.compile(r"^[ \t]*([\w-]+)[ \t]*::=", re.MULTILINE)
_WORD = re.compile(r"[\w-]+")
_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|#.*')
_CLASS = re.compile(r"\\.|\[(?:[^\]\\]|\\.)*\]", re.DOTALL)
_LENGTHS = (("minItems", "maxItems"), ("minLength", "maxLength"))
_REPEATED = re.compile(r"\{(\d{0,9})(?:,(\d{0,9}))?\}")


def check_grammars(request: Mapping[str, Any]) -> None:
    """Raise InvalidRequestError, with the field, for a schema or grammar that would block other calls."""
    field, what = "", "references"
    totals: Counter[str] = Counter()
    try:
        for field, schema in _schemas(request):
            if isinstance(schema, dict):
                _check_schema(field, schema, totals)
        grammar = request.get("grammar")
        if isinstance(grammar, str):
            field, what = "grammar", "rules"
            _check_grammar(grammar)
    except RecursionError:
        raise InvalidRequestError.at(field, f"{what} are nested too deeply") from None


def _check_grammar(grammar: str) -> None:
    _require("grammar", "characters", len(grammar), _MAX_CHARACTERS)
    _require("grammar", "alternatives", grammar.count("|") + 1, _MAX_ALTERNATIVES)
    _require("grammar", "steps with expanded repetitions", _expanded(grammar), max(_MAX_EXPANDED, len(grammar)))
    plain = _LITERAL.sub(" ", grammar)
    _check_order("grammar", plain)
    _require("grammar", "expanded rules", _expanded_rules(plain), _MAX_RULES)


def _schemas(request: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    form = request.get("response_format")
    if isinstance(form, dict):
        named = form.get("json_schema")
        yield "response_format", named.get("schema") if isinstance(named, dict) else None
        yield "response_format", form.get("schema")
    yield "json_schema", request.get("json_schema")
    tools = request.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        function = tool.get("function") if isinstance(tool, dict) else None
        if isinstance(function, dict):
            yield f"tools[{index}].function.parameters", function.get("parameters")


def _check_schema(field: str, root: dict[str, Any], totals: Counter[str]) -> None:
    """Check one schema. `totals` counts over all schemas of a request."""

    def add(what: str, count: int, most: int) -> None:
        totals[what] += count
        _require(field, what, totals[what], most)

    add("characters", len(json.dumps(root, ensure_ascii=False)), _MAX_CHARACTERS)
    known: dict[int, int] = {}
    waiting: list[Any] = [root]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            add("schemas", 1, _MAX_SCHEMAS)
            choices = [one[key] for key in ("enum", "anyOf", "oneOf") if isinstance(one.get(key), list)]
            add("values in enum, anyOf and oneOf", sum(map(len, choices)), _MAX_ALTERNATIVES)
            _check_limits(field, one)
            _require(field, "alternatives behind references", _alternatives(one, root, known), _MAX_ALTERNATIVES)
            waiting += one.values()


def _check_limits(field: str, schema: dict[str, Any]) -> None:
    properties, pattern = schema.get("properties"), schema.get("pattern")
    if isinstance(properties, dict):
        _require(field, "properties of one object", len(properties), _MAX_PROPERTIES)
    if isinstance(pattern, str):
        _require(f"{field}: pattern", "steps with expanded repetitions", _expanded(pattern), _MAX_EXPANDED)
        _check_order(f"{field}: pattern", _CLASS.sub(" ", pattern))
    for least, most in _LENGTHS:
        low, high = schema.get(least), schema.get(most)
        if isinstance(low, int) and isinstance(high, int) and low > high:
            raise InvalidRequestError.at(field, f"{least} ({low}) exceeds {most} ({high})")


def _alternatives(schema: Any, root: dict[str, Any], known: dict[int, int]) -> int:
    """The alternatives for the first character of a value; 1 for a schema that refers to itself directly, which
    llama.cpp rejects. `known` has those of the schemas of `root` that were counted, by their identity.
    """
    if not isinstance(schema, dict):
        return 1
    key, reference = id(schema), schema.get("$ref")
    if key not in known:
        known[key] = 1
        among = [schema[name] for name in ("anyOf", "oneOf") if isinstance(schema.get(name), list)]
        total = sum(_alternatives(one, root, known) for inner in among for one in inner)
        if isinstance(reference, str):
            total += _alternatives(_resolve(root, reference), root, known)
        known[key] = max(total, 1)
    return known[key]


def _resolve(root: Any, reference: str) -> Any:
    for step in reference.removeprefix("#/").split("/"):
        root = root.get(step) if isinstance(root, dict) else None
    return root


def _require(field: str, what: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidRequestError.at(
            field, f"{count} {what} would block other calls of the model; the limit is {most}"
        )


def _check_order(field: str, plain: str) -> None:
    for repeated in _REPEATED.finditer(plain):
        least, most = repeated[1], repeated[2]
        if least and most and int(least) > int(most):
            raise InvalidRequestError.at(field, f"in {repeated[0]} the minimum exceeds the maximum")


def _expanded_rules(plain: str) -> int:
    """The number of rules of a grammar, without its literals, when each use of a rule is expanded.

    A recursive use counts once.
    """
    names = list(_RULE.finditer(plain))
    ends = [*(name.start() for name in names[1:]), len(plain)]
    uses = {name[1]: _WORD.findall(plain, name.end(), end) for name, end in zip(names, ends, strict=False) if name[1]}
    known: dict[str, int] = {}

    def count(name: str) -> int:
        if name not in known:
            known[name] = 1
            known[name] += sum(count(used) for used in uses[name] if used in uses)
        return known[name]

    return max(map(count, uses), default=0)


def _expanded(pattern: str) -> int:
    """The approximate length of a regular expression or grammar with its counted repetitions expanded."""
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
