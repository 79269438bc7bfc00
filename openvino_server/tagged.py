"""Parser of tool calls in tags, the format of Qwen3-Coder and GLM-4.5.

    <tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>
    <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>…</tool_call>

A value may contain any text, closing tags included: it ends at the first closing tag that is followed by another tag
of the format. The function's JSON schema decides the type of a value.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DECODER", "begins", "calls"]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse)
"""Decodes JSON from models: strings may contain unescaped line breaks; NaN and Infinity are errors."""

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*")
_FUNCTION_ENDS = re.compile(r"\s*</function>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
_PARAMETER_ENDS = re.compile(r"\n?</parameter>(?=\s*(?:<parameter=[^>\n]+>|</function>))")
_NAME = re.compile(r"\s*([\w.-]+)\s*(?=<arg_key>|</tool_call>)")
_NAME_BEGINS = re.compile(r"\s*(?:[\w.-]+\s*)?(?:<[/\w]*)?\Z")
_KEY = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>\n?", re.DOTALL)
_VALUE_ENDS = re.compile(r"\n?</arg_value>(?=\s*(?:<arg_key>|</tool_call>))")
_CLOSED = re.compile(r"\s*</tool_call>")
_UNSURE = re.compile(r"\s*(?:<[/\w=]*)?\Z")

Calls = list[tuple[str, str]]
Schemas = dict[str, dict[str, Any]]


def begins(text: str, at: int) -> bool:
    """Whether the text from `at` on may be the beginning of a call."""
    start = text[at:].lstrip()
    tag = "<function="
    return (
        start.startswith(tag)
        or tag.startswith(start)
        or _NAME_BEGINS.match(text, at) is not None
        or _NAME.match(text, at) is not None
    )


def calls(text: str, schemas: Schemas, *, alone: bool, over: bool) -> tuple[Calls, int] | None:
    """The calls at the beginning of the text, as (name, arguments in JSON), and the index of their end.

    The list is empty if the text is not a call; the result is None while that is undecided. `schemas` are the
    functions' parameters by name. `alone`: the text begins with `<function=`, and only functions of `schemas` count.
    `over`: the text is complete.
    """
    at = 0 if alone else len(_OPEN)
    if _FUNCTION.match(text, at):
        return _functions(text, at, schemas, alone=alone, over=over)
    if alone or not begins(text, at):
        return [], 0
    return _named(text, at, schemas)


def _functions(text: str, at: int, schemas: Schemas, *, alone: bool, over: bool) -> tuple[Calls, int] | None:
    found: Calls = []
    while (head := _FUNCTION.match(text, at)) is not None:
        name = head[1].strip()
        if alone and not found and name not in schemas:
            return [], 0
        read = _parameters(text, head.end())
        if read is None:
            break
        values, at = read
        found.append((name, _arguments(values, schemas.get(name))))
    closed = _CLOSED.match(text, at)
    if found and closed is not None:
        return found, closed.end()
    if not found or (not over and (_UNSURE.match(text, at) or _FUNCTION.match(text, at))):
        return None
    return found, at


def _parameters(text: str, at: int) -> tuple[dict[str, Any], int] | None:
    """The values of a function's parameters, by name, and the index of its end; None while it is incomplete."""
    if text.startswith("{", at):  # as Llama 3.1 writes it
        try:
            value, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        closed = _FUNCTION_ENDS.match(text, end)
        return (value, closed.end()) if closed is not None else None
    return _values(text, at, _PARAMETER, _PARAMETER_ENDS, _FUNCTION_ENDS)


def _values(
    text: str, at: int, begins: re.Pattern[str], ends: re.Pattern[str], closes: re.Pattern[str]
) -> tuple[dict[str, Any], int] | None:
    """The values in tags, by the name in `begins`, and the index after `closes`; None while they are incomplete."""
    values: dict[str, Any] = {}
    while (head := begins.match(text, at)) is not None:
        end = ends.search(text, head.end())
        if end is None:
            return None
        values[head[1].strip()] = text[head.end() : max(head.end(), end.start())]
        at = end.end()
    closed = closes.match(text, at)
    return (values, closed.end()) if closed is not None else None


def _named(text: str, at: int, schemas: Schemas) -> tuple[Calls, int] | None:
    """A call that begins with a bare name. Without arguments it counts only if `schemas` has the name."""
    head = _NAME.match(text, at)
    if head is None:
        return None
    name, found = head[1], _values(text, head.end(), _KEY, _VALUE_ENDS, _CLOSED)
    if found is None:
        return None
    values, end = found
    if not values and name not in schemas:
        return [], 0
    return [(name, _arguments(values, schemas.get(name)))], end


def _arguments(values: dict[str, Any], schema: Any) -> str:
    found = {
        key: _typed(value, _at(schema, ["properties", key]), schema) if isinstance(value, str) else value
        for key, value in values.items()
    }
    return json.dumps(found, ensure_ascii=False)


_WORDS = {"True": True, "False": False, "None": None}


def _typed(value: str, schema: Any, root: Any) -> Any:
    """The value that a parameter's text has by its schema; `root` resolves the schema's references.

    A schema that allows strings yields the text itself, unless the text is a null, list or object that the schema
    allows too.
    """
    types = set(_types(schema, root, 0))
    try:
        parsed = _WORDS[value] if value in _WORDS else json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return value
    if "string" not in types:
        return parsed
    kind = _kind(parsed)
    return parsed if kind in types and kind in ("null", "array", "object") else value


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "boolean", list: "array", dict: "object", str: "string"}
    return kinds.get(type(value), "number")


_DEEPEST = 16


def _types(schema: Any, root: Any, depth: int) -> Iterator[str]:
    """The names of the types that a schema allows; nothing if it does not restrict them."""
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return
    if schema.get("nullable") is True:
        yield "null"
    named = schema.get("type")
    yield from (one for one in (named if isinstance(named, list) else [named]) if isinstance(one, str))
    if named is None:
        listed = schema.get("enum")
        yield from map(_kind, listed if isinstance(listed, list) else [schema["const"]] if "const" in schema else [])
    for key in ("anyOf", "oneOf", "allOf"):
        for one in schema[key] if isinstance(schema.get(key), list) else []:
            yield from _types(one, root, depth + 1)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        yield from _types(_at(root, reference[2:].split("/")), root, depth + 1)


def _at(shape: Any, path: list[str]) -> Any:
    """The value in nested objects; None if there is none."""
    for key in path:
        shape = shape.get(key) if isinstance(shape, dict) else None
    return shape
