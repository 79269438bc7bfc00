"""Tool calls in the text of an answer, in the ways that families of models write them.

A parser is fed pieces of text and gives OpenAI's deltas: plain text, or `{"tool_calls": […]}`. Calls in JSON are told
while they are written: first the name, then the arguments as they come.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import string
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from engine_plugin.engines.openvino.runner.pipelines.text import held_back

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PARSERS", "Style", "ToolParser", "guess", "parser"]

_LETTERS = string.ascii_letters + string.digits
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)")

Delta = Any
Schemas = dict[str, dict[str, Any]]


class Style(NamedTuple):
    """How a family writes calls."""

    make: Callable[[Schemas], ToolParser]
    special: bool
    """Whether its marks are tokens that are not shown unless asked for."""
    frame: tuple[str, str, str] | None
    """Before a name, between name and arguments, after them; of a call that a grammar forces."""


class ToolParser(ABC):
    """Finds calls between an opening and a closing mark. Subclasses read what is between."""

    def __init__(self, opens: tuple[str, ...], closes: str) -> None:
        self._opens = opens
        self._closes = closes
        self._inside = False
        self._text = ""
        self._count = 0

    @property
    def called(self) -> bool:
        """Whether there was a call."""
        return self._count > 0

    def feed(self, text: str) -> list[Delta]:
        """What a piece of text brings."""
        self._text += text
        found: list[Delta] = []
        while self._inside or self._open(found):
            if not self._read(found):
                break
            self._inside = False
        return found

    def end(self) -> list[Delta]:
        """What was held back: a call that was cut off is text."""
        rest, self._text = self._text, ""
        return [rest] if rest.strip() else []

    def _open(self, found: list[Delta]) -> bool:
        """Tell the text before the next opening mark; whether there is one."""
        hits = [(self._text.find(mark), mark) for mark in self._opens]
        at, mark = min(((at, mark) for at, mark in hits if at >= 0), default=(-1, ""))
        if at < 0:
            at = len(self._text) - max(held_back(self._text, mark) for mark in self._opens)
        before, self._text = self._text[:at], self._text[at:]
        if before and (before.strip() or not self.called):
            found.append(before)
        if mark:
            self._text = self._text[len(mark) :]
            self._inside = True
        return self._inside

    @abstractmethod
    def _read(self, found: list[Delta]) -> bool:
        """Take what can be read of `_text`; whether the closing mark was among it."""

    def _begin(self, name: str, arguments: str) -> Delta:
        """The delta that begins a call."""
        function = {"name": name, "arguments": arguments}
        call = {"index": self._count, "id": _identity(), "type": "function", "function": function}
        self._count += 1
        return {"tool_calls": [call]}

    def _more(self, arguments: str) -> Delta:
        return {"tool_calls": [{"index": self._count - 1, "function": {"arguments": arguments}}]}


class _JsonCalls(ToolParser):
    """Objects, alone or in lists: {"name": …, "arguments": {…}}; with Mistral's newer models name{…}."""

    def __init__(self, opens: tuple[str, ...], closes: str = "", named: bool = False, bare: bool = False) -> None:
        super().__init__(opens, closes)
        self._named = named
        self._bare = bare  # an answer that begins with an object is a call
        self._state = "between"
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self._bracketed = True

    def feed(self, text: str) -> list[Delta]:
        if self._bare:
            start = (self._text + text).lstrip()
            if not start:
                self._text += text
                return []
            self._bare = False
            self._inside = start.startswith("{")
        return super().feed(text)

    def _open(self, found: list[Delta]) -> bool:
        self._state = "between"
        return super()._open(found)

    def _read(self, found: list[Delta]) -> bool:
        while True:
            before = (self._state, len(self._text))
            if self._state == "between" and self._between(found):
                return True
            if self._state == "head":
                self._head(found)
            elif self._state == "arguments":
                self._arguments(found)
            elif self._state == "tail":
                self._tail()
            if (self._state, len(self._text)) == before:
                return False

    def _between(self, found: list[Delta]) -> bool:
        """Look for the next object; whether the calls have ended."""
        self._text = self._text.lstrip(" \t\r\n,;[]" if not self._closes.startswith("]") else " \t\r\n,;[")
        if not self._text:
            return False
        if self._closes and self._text.startswith(self._closes):
            self._text = self._text[len(self._closes) :]
            return True
        if self._text.startswith("{"):
            self._state = "head"
        elif self._named and (match := _NAMED.match(self._text)):
            found.append(self._begin(match[1], ""))
            self._text = self._text[match.end() :]
            self._state, self._depth, self._bracketed = "arguments", 0, False
        elif self._named and re.fullmatch(r"\s*[\w.-]+\s*(\[[A-Z_]*\]?\s*\w*\s*)*", self._text):
            return False
        elif self._closes and not self._closes.startswith(self._text):
            at = self._text.find(self._closes)
            if at >= 0:
                self._text = self._text[at + len(self._closes) :]
                return True
        elif any(mark.startswith(self._text) or self._text.startswith(mark) for mark in self._opens):
            return any(self._text.startswith(mark) for mark in self._opens)
        elif not self._closes:
            return True  # what follows is text again
        return False

    def _head(self, found: list[Delta]) -> None:
        match = _HEAD.match(self._text)
        if match:
            try:
                name = json.loads(match[1])
            except ValueError:
                name = match[1].strip('"')
            found.append(self._begin(name, ""))
            self._text = self._text[match.end() :]
            self._state, self._depth, self._bracketed = "arguments", 0, True
            return
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(self._text)
        except ValueError:
            return
        raw, self._text = self._text[:end], self._text[end:]
        self._state = "between"
        found.append(self._whole(value) or raw)

    def _whole(self, value: dict[str, Any]) -> Delta | None:
        """A call whose parts came in another order."""
        inner = value.get("function") if isinstance(value.get("function"), dict) else value
        name = inner.get("name") if isinstance(inner, dict) else None
        if not isinstance(name, str) or not isinstance(inner, dict):
            return None
        arguments = inner.get("arguments", inner.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return self._begin(name, text)

    def _arguments(self, found: list[Delta]) -> None:
        at, ended = self._scan()
        if at:
            found.append(self._more(self._text[:at]))
            self._text = self._text[at:]
        if ended:
            self._state = "tail" if self._bracketed else "between"
            self._depth = 1

    def _tail(self) -> None:
        """The rest of the object that the arguments were in."""
        at, ended = self._scan()
        self._text = self._text[at:]
        if ended:
            self._state = "between"

    def _scan(self) -> tuple[int, bool]:
        """How far the text belongs to the object that is being read, and whether it ends there."""
        for at, character in enumerate(self._text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return at + 1, True
        return len(self._text), False

    def end(self) -> list[Delta]:
        if self._inside and self._state != "head":
            self._text = ""
        return super().end()


class _BlockCalls(ToolParser):
    """Calls that can be read when their block is whole."""

    def __init__(self, opens: str, closes: str, read: Callable[[str], list[tuple[str, str]] | None]) -> None:
        super().__init__((opens,), closes)
        self._read_block = read

    def _read(self, found: list[Delta]) -> bool:
        block, mark, rest = self._text.partition(self._closes)
        if not mark:
            return False
        calls = self._read_block(block)
        found += [block] if calls is None else [self._begin(name, arguments) for name, arguments in calls]
        self._text = rest
        return True


def _xml_calls(schemas: Schemas) -> Callable[[str], list[tuple[str, str]] | None]:
    """<function=name><parameter=key>value</parameter>…</function>; values are texts unless their schema says more."""

    def read(block: str) -> list[tuple[str, str]] | None:
        found = []
        for name, body in re.findall(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", block, re.DOTALL):
            properties = schemas.get(name.strip(), {}).get("properties") or {}
            arguments = {}
            for key, value in re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL):
                schema = properties.get(key.strip())
                arguments[key.strip()] = _typed(value, schema if isinstance(schema, dict) else {})
            found.append((name.strip(), json.dumps(arguments, ensure_ascii=False)))
        return found or None

    return read


def _typed(value: str, schema: dict[str, Any]) -> Any:
    if schema.get("type") == "string":
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _python_calls(block: str) -> list[tuple[str, str]] | None:
    """[name(key="value"), …]"""
    try:
        tree = ast.parse(block.strip(), mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        return [
            (
                ast.unparse(call.func),
                json.dumps(
                    {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}, ensure_ascii=False
                ),
            )
            for call in calls
            if isinstance(call, ast.Call)
        ]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


_HERMES = Style(
    lambda _: _JsonCalls(("<tool_call>",), "</tool_call>"),
    True,
    ('<tool_call>\n{"name": ', ', "arguments": ', "}\n</tool_call>"),
)
_LLAMA = Style(lambda _: _JsonCalls(("<|python_tag|>",), bare=True), True, ('{"name": ', ', "parameters": ', "}"))
_MISTRAL = Style(
    lambda _: _JsonCalls(("[TOOL_CALLS]",), named=True), True, ('[TOOL_CALLS][{"name": ', ', "arguments": ', "}]")
)
PARSERS: dict[str, Style] = {
    "hermes3": _HERMES,
    "qwen3": _HERMES,
    "llama3": _LLAMA,
    "mistral": _MISTRAL,
    "devstral": Style(_MISTRAL.make, True, None),
    "phi4": Style(
        lambda _: _JsonCalls(("functools", "<|tool_call|>"), "<|/tool_call|>"),
        True,
        ('functools[{"name": ', ', "arguments": ', "}]"),
    ),
    "qwen3coder": Style(lambda schemas: _BlockCalls("<tool_call>", "</tool_call>", _xml_calls(schemas)), True, None),
    "lfm2": Style(lambda _: _BlockCalls("<|tool_call_start|>", "<|tool_call_end|>", _python_calls), True, None),
}
"""By the names that OVMS has for them."""

_MARKS = (
    ("<function=", "qwen3coder"),
    ("<tool_call>", "hermes3"),
    ("[ARGS]", "devstral"),
    ("[TOOL_CALLS]", "mistral"),
    ("functools", "phi4"),
    ("<|tool_call|>", "phi4"),
    ("<|tool_call_start|>", "lfm2"),
    ("<|python_tag|>", "llama3"),
    ('"parameters": dictionary', "llama3"),
)


def guess(template: str) -> str | None:
    """The parser for what a template writes; None where it says nothing of calls."""
    return next((name for mark, name in _MARKS if mark in template), None)


def parser(name: str, tools: list[dict[str, Any]]) -> ToolParser:
    """A parser of PARSERS for one answer."""
    functions = [tool["function"] for tool in tools]
    return PARSERS[name].make({function["name"]: function.get("parameters") or {} for function in functions})


def _identity() -> str:
    """Nine letters: templates of Mistral's check that."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))
