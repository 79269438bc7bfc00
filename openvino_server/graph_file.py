"""Reads graph.pbtxt: which calculator serves a model, where its files are, and with which options.

A small reader of protobuf's text format, which knows no schema: it takes every field, and only the options of
the calculators below are looked at. Errors name the line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Graph", "GraphError", "Message", "parse_text", "read_graph"]

Value: TypeAlias = "str | int | float | bool | Message"

KINDS = {
    "HttpLLMCalculator": "chat",
    "EmbeddingsCalculatorOV": "embed",
    "RerankCalculatorOV": "rerank",
    "ImageGenCalculator": "text-to-image",
    "S2tCalculator": "speech-to-text",
    "T2sCalculator": "text-to-speech",
}
_REPEATED = {"voices", "lora_adapters"}
_DEVICE_FIELDS = ("device", "target_device")
_DEEPEST = 64

_TOKEN = re.compile(
    r"""
      (?P<space>(?:\s|\#[^\n]*)+)
    | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    | (?P<number>[-+]?(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?[fF]?)(?![\w.]))
    | (?P<name>-?[A-Za-z_][\w]*)
    | (?P<sign>[{}<>\[\]:;,/.])
    """,
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_WORDS: dict[str, bool | float] = {"true": True, "false": False, "inf": float("inf"), "nan": float("nan")}
_WORDS |= {"-inf": float("-inf"), "infinity": float("inf"), "-infinity": float("-inf"), "-nan": float("nan")}


class GraphError(ValueError):
    """A graph that cannot be served; says the line where it can."""


@dataclass
class Message:
    """One message of the text format: its fields in order, each with the line it begins on."""

    line: int
    fields: list[tuple[str, Value, int]] = field(default_factory=list)

    def values(self, name: str) -> list[Value]:
        """All values of a field."""
        return [value for key, value, _ in self.fields if key == name]

    def messages(self, name: str) -> list[Message]:
        """All values of a field that are messages."""
        return [value for value in self.values(name) if isinstance(value, Message)]

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists; a field that may be repeated is always a list."""
        result: dict[str, Any] = {}
        for name, value, _ in self.fields:
            plain = value.as_dict() if isinstance(value, Message) else value
            if name not in result:
                result[name] = [plain] if name in _REPEATED else plain
            elif isinstance(result[name], list):
                result[name].append(plain)
            else:
                result[name] = [result[name], plain]
        return result


@dataclass(frozen=True)
class Graph:
    """What a graph serves. `options` are the calculator's, named as OVMS names them."""

    calculator: str
    kind: str
    models_path: Path
    device: str
    options: dict[str, Any]


def read_graph(text: str, folder: Path) -> Graph:
    """The graph in `text`; a relative models_path is below `folder`. Raises GraphError."""
    root = parse_text(text)
    nodes = root.messages("node")
    known = [node for node in nodes if _calculator(node) in KINDS]
    if len(known) != 1:
        found = ", ".join(sorted({_calculator(node) or "?" for node in nodes})) or "none"
        raise GraphError(f"graph: needs exactly one node of {', '.join(KINDS)}, and has {found}")
    node = known[0]
    calculator = _calculator(node)
    options = _options(node, calculator)
    path = options.pop("models_path", None)
    if not isinstance(path, str) or not path:
        raise GraphError(f"graph: line {node.line}: models_path is missing from {calculator}'s options")
    device = next((options.pop(name) for name in _DEVICE_FIELDS if name in options), "CPU")
    _check_plugin_config(options.get("plugin_config"))
    return Graph(calculator, KINDS[calculator], folder / path, str(device) or "CPU", options)


def _calculator(node: Message) -> str:
    return next((str(value) for value in node.values("calculator")), "")


def _options(node: Message, calculator: str) -> dict[str, Any]:
    """The node's options of the type that belongs to the calculator."""
    for holder in [*node.messages("node_options"), *node.messages("options")]:
        for name, value, _ in holder.fields:
            if isinstance(value, Message) and name.endswith((f"{calculator}Options", "LLMCalculatorOptions")):
                return value.as_dict()
    raise GraphError(f"graph: line {node.line}: {calculator} has no node_options")


def _check_plugin_config(text: Any) -> None:
    if text in (None, ""):
        return
    try:
        if isinstance(json.loads(text), dict):
            return
    except (TypeError, ValueError):
        pass
    raise GraphError(f"graph: plugin_config must be a JSON object, not {text!r}")


def parse_text(text: str) -> Message:
    """The message in `text`. Raises GraphError with the line of what is wrong."""
    reader = _Reader(text)
    return reader.message(1, "", 0)


class _Reader:
    """Recursive descent over the tokens; a token is (kind, text, line), the last one ("", "", line)."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._at = 0

    def _peek(self) -> tuple[str, str, int]:
        return self._tokens[self._at]

    def _next(self) -> tuple[str, str, int]:
        token = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def _accept(self, *signs: str) -> bool:
        kind, text, _ = self._peek()
        if kind == "sign" and text in signs:
            self._at += 1
            return True
        return False

    def message(self, line: int, closing: str, depth: int) -> Message:
        if depth > _DEEPEST:
            raise GraphError(f"graph: line {line}: messages are nested too deeply")
        result = Message(line)
        while True:
            kind, _text, here = self._peek()
            if not kind:
                if closing:
                    raise GraphError(f"graph: line {line}: the message that begins here has no {closing}")
                return result
            if closing and self._accept(closing):
                return result
            name = self._field_name()
            self._field_values(result, name, here, depth)
            self._accept(",", ";")

    def _field_name(self) -> str:
        kind, text, line = self._next()
        if kind == "name":
            return text
        if (kind, text) != ("sign", "["):
            raise GraphError(f"graph: line {line}: a field's name is expected, not {text}")
        parts = []
        while not self._accept("]"):
            kind, text, _ = self._next()
            if kind not in ("name", "number") and text not in ("/", "."):
                raise GraphError(f"graph: line {line}: the name that begins here has no ]")
            parts.append(text)
        return "".join(parts)

    def _field_values(self, result: Message, name: str, line: int, depth: int) -> None:
        colon = self._accept(":")
        if self._accept("["):
            while not self._accept("]"):
                result.fields.append((name, self._value(line, depth), line))
                if not self._accept(",") and self._peek()[1] != "]":
                    raise GraphError(f"graph: line {self._peek()[2]}: , or ] is expected in the list of {name}")
            return
        if not colon and self._peek()[1] not in ("{", "<"):
            raise GraphError(f"graph: line {line}: : or {{ is expected after {name}")
        result.fields.append((name, self._value(line, depth), line))

    def _value(self, line: int, depth: int) -> Value:
        kind, text, here = self._next()
        if kind == "sign" and text in "{<":
            return self.message(here, "}" if text == "{" else ">", depth + 1)
        if kind == "string":
            pieces = [_unescape(text)]
            while self._peek()[0] == "string":
                pieces.append(_unescape(self._next()[1]))
            return "".join(pieces)
        if kind == "number":
            return _number(text)
        if kind == "name":
            return _WORDS.get(text.lower(), text)
        raise GraphError(f"graph: line {here or line}: a value is expected, not {text or 'the end'}")


def _tokens(text: str) -> list[tuple[str, str, int]]:
    tokens = []
    at, line = 0, 1
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise GraphError(f"graph: line {line}: cannot be read: {text[at : at + 20].splitlines()[0]!r}")
        if found.lastgroup != "space":
            tokens.append((str(found.lastgroup), found.group(), line))
        line += found.group().count("\n")
        at = found.end()
    return [*tokens, ("", "", line)]


def _unescape(literal: str) -> str:
    def letter(found: re.Match[str]) -> str:
        octal, short, four, eight, plain = found.groups()
        if octal:
            return chr(int(octal, 8))
        for digits in (short, four, eight):
            if digits:
                return chr(min(int(digits, 16), 0x10FFFF))
        return _LETTERS.get(plain, plain)

    return _ESCAPE.sub(letter, literal[1:-1])


def _number(text: str) -> int | float:
    lowered = text.lower()
    if "0x" in lowered:
        return int(text, 16)
    digits = lowered.lstrip("+-")
    if digits.isdigit():
        return int(text, 8) if len(digits) > 1 and digits[0] == "0" and not set(digits) & set("89") else int(text)
    return float(lowered.rstrip("f"))
