"""Parsers of the tool calls in the text of an answer, one for each format that families of models write.

A parser takes the text in pieces and returns OpenAI's deltas: plain text, or `{"tool_calls": […]}`. Calls in JSON are
streamed: first the name, then the arguments as they arrive. Text that does not parse as a call stays text, with the
marks around it.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import string
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from engine_plugin.errors import InvalidRequestError
from engine_plugin.openai_api.conversation import call_arguments
from openvino_server import tagged
from openvino_server.pipelines.text import held_back

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import TypeAlias

    Reading: TypeAlias = Generator[None, None, bool]

__all__ = ["PARSERS", "Style", "ToolParser", "Tools", "guess", "parser"]


class Tools(NamedTuple):
    """The tools of a request, as OpenAI's `tools` entries: those that the model may call, and those that it must."""

    offered: list[dict[str, Any]]
    forced: list[dict[str, Any]]


_LETTERS = string.ascii_letters + string.digits
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAMED = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)")
_NAMED_BEGINS = re.compile(r"[\w.-]+\s*(?:\[[A-Z_]*\]?\s*\w*\s*)*\Z")
_LEAD = re.compile(r"\s*(?:```(?:json)?\s*)?(\[?)\s*")
_FENCE_BEGINS = re.compile(r"\s*(?:`{1,2}|```j?s?o?)")
_BETWEEN = re.compile(r"[\s,;\[\]`]*")
_ENDS_LIST = re.compile(r"\s*\]")

Delta = Any
Schemas = dict[str, dict[str, Any]]


class Style(NamedTuple):
    """The format in which a family writes calls."""

    make: Callable[[Schemas], ToolParser]
    special: bool
    """Whether its marks are special tokens, which the detokenizer omits by default."""
    frame: tuple[str, str, str] | None
    """The text before the name, between name and arguments, and after them, for calls that a grammar forces. None:
    they cannot be forced."""


class ToolParser(ABC):
    """Finds calls after an opening mark. Subclasses read the text after it.

    The methods that read are generators: they yield where they need more text.
    """

    def __init__(self, opens: tuple[str, ...], closes: str) -> None:
        self._opens = opens
        self._closes = closes
        self._text = ""
        """What has not been emitted; while a mark is read, it begins with it until a call has been found after it."""
        self._piece = ""
        self._over = False
        """Whether the text is complete."""
        self._found: list[Delta] = []
        self._count = 0
        self._after_call = False
        self._blank = ""
        """White space since the last call, which is dropped if another call follows."""
        self._reading = self._read_all()

    @property
    def called(self) -> bool:
        """Whether there was a call."""
        return self._count > 0

    def feed(self, text: str) -> list[Delta]:
        """The deltas that this piece of text completes."""
        self._text += text
        self._piece = text
        next(self._reading)
        found, self._found = self._found, []
        return found

    def end(self) -> list[Delta]:
        """The last deltas, at the end of the text. A call that was cut off before its name is text."""
        self._over = True
        found = self.feed("")
        self._emit(self._text)
        return found + self._found

    def _read_all(self) -> Iterator[None]:
        """Read the text, without an end."""
        while True:
            mark = self._to_mark()
            if not mark:
                yield
            elif not (yield from self._read(mark)):
                self._emit(mark)
                self._text = self._text[len(mark) :]

    def _to_mark(self) -> str:
        """Emit the text before the next opening mark. Returns the mark; "" if there is none."""
        hits = [(self._text.find(mark), mark) for mark in self._opens]
        at, mark = min(((at, mark) for at, mark in hits if at >= 0), default=(-1, ""))
        if at < 0:
            at = len(self._text) - max(held_back(self._text, mark) for mark in self._opens)
        self._emit(self._text[:at])
        self._text = self._text[at:]
        return mark

    def _emit(self, text: str) -> None:
        """Emit text, without white space between calls."""
        if self._after_call and not text.strip():
            self._blank += text
        elif text:
            self._found.append(self._blank + text)
            self._blank, self._after_call = "", False

    @abstractmethod
    def _read(self, mark: str) -> Reading:
        """Read the calls after the mark that begins `_text`, and consume their text.

        Returns whether there were any; if not, `_text` still begins with the mark.
        """

    def _begin(self, name: str, arguments: str) -> None:
        """Emit the delta that begins a call."""
        function = {"name": name, "arguments": arguments}
        call = {"index": self._count, "id": _identity(), "type": "function", "function": function}
        self._count += 1
        self._blank, self._after_call = "", True
        self._found.append({"tool_calls": [call]})


class _JsonCalls(ToolParser):
    """JSON objects, alone or in lists: {"name": …, "arguments": {…}}. `named`: also name{…}, as newer Mistrals."""

    def __init__(
        self, opens: tuple[str, ...], closes: str = "", *, named: bool = False, bare: Schemas | None = None
    ) -> None:
        """`bare`: an object at the beginning of the answer is a call too, if it names one of these functions."""
        super().__init__(opens, closes)
        self._named = named
        self._bare = bare

    def _read_all(self) -> Iterator[None]:
        if self._bare is not None:
            while not self._over and not self._text.strip():
                yield
            if self._text.lstrip().startswith("{"):
                yield from self._read("")
            self._bare = None  # only the beginning of the answer counts
        yield from super()._read_all()

    def _read(self, mark: str) -> Reading:
        while True:
            lead = _LEAD.match(self._text, len(mark))
            assert lead is not None  # noqa: S101  # the pattern matches any text
            complete = lead.end() < len(self._text) and not _FENCE_BEGINS.fullmatch(self._text, len(mark))
            if complete or self._over:
                break
            yield
        listed = bool(lead[1]) or mark.endswith("[")
        if not (yield from self._item(lead.end())):
            return False
        self._bare = None
        while True:
            between = _BETWEEN.match(self._text)
            assert between is not None  # noqa: S101  # the pattern matches any text
            at = between.end()
            if self._closes and self._text.startswith(self._closes, at):
                self._text = self._text[at + len(self._closes) :]
                return True
            rest = self._text[at : at + len(self._closes)]
            if not self._over and self._closes.startswith(rest) and (rest or at == len(self._text)):
                yield
            elif not (yield from self._item(at)):
                ended = _ENDS_LIST.match(self._text) if listed else None
                self._text = self._text[ended.end() if ended else 0 :]
                return True

    def _item(self, at: int) -> Reading:
        """Read the call that begins at `at`. Returns whether there is one."""
        if self._text.startswith("{", at):
            return (yield from self._object(at))
        if not self._named:
            return False
        while not (match := _NAMED.match(self._text, at)):
            if self._over or not _NAMED_BEGINS.match(self._text, at):
                return False
            yield
        yield from self._arguments(match[1], match.end())
        return True

    def _object(self, at: int) -> Reading:
        while not (head := _HEAD.match(self._text, at)):
            try:
                value, end = tagged.DECODER.raw_decode(self._text, at)
            except (ValueError, RecursionError):
                if self._over or ("}" in self._piece and _Nesting().end(self._text[at:])):
                    return False
                yield
                continue
            call = _whole(value, self._bare)
            if call is not None:
                self._begin(*call)
                self._text = self._text[end:]
            return call is not None
        try:
            name = str(json.loads(head[1]))
        except ValueError:
            name = head[1].strip('"')
        if self._bare is not None and name not in self._bare:
            return False
        yield from self._arguments(name, head.end())
        yield from self._after_arguments()
        return True

    def _arguments(self, name: str, at: int) -> Iterator[None]:
        """Stream a call whose arguments begin at `at`."""
        self._begin(name, "")
        self._text = self._text[at:]
        nesting, index = _Nesting(), self._count - 1
        while True:
            end = nesting.end(self._text)
            at = end or len(self._text)
            if at:
                function = {"arguments": self._text[:at]}
                self._found.append({"tool_calls": [{"index": index, "function": function}]})
                self._text = self._text[at:]
            if end or self._over:
                return
            yield

    def _after_arguments(self) -> Iterator[None]:
        """Read the rest of the object around the arguments: other members, and a closing brace if there is one."""
        while True:
            start = self._text.lstrip()
            end = _Nesting().end("{" + start) if start.startswith(",") else 0
            if self._over or end or (start and not start.startswith(",")):
                break
            yield
        if start.startswith("}"):
            self._text = start[1:]
        elif end:
            try:
                json.loads('{"name": 0' + start[: end - 1], strict=False)
            except ValueError:
                return
            self._text = start[end - 1 :]


class _Nesting:
    """Finds the end of a JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    def end(self, piece: str) -> int:
        """The end of the object in the next piece; 0 if the object goes on."""
        for at, character in enumerate(piece, 1):
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
                    return at
        return 0


def _whole(value: Any, among: Schemas | None) -> tuple[str, str] | None:
    """The name and the arguments (JSON) of a call in a complete object; None if it is not a call.

    `among`: only these functions count.
    """
    inner = value.get("function") if isinstance(value.get("function"), dict) else value
    name = inner.get("name")
    if not isinstance(name, str) or not name or (among is not None and name not in among):
        return None
    try:
        arguments = call_arguments(inner.get("arguments", inner.get("parameters")), "")
    except InvalidRequestError:
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


class _TaggedCalls(_JsonCalls):
    """Calls between <tool_call> and </tool_call>: JSON, <function=…> or <arg_key>; <function=…> also without them."""

    def __init__(self, schemas: Schemas) -> None:
        super().__init__(("<tool_call>", "<function="), "</tool_call>")
        self._schemas = schemas

    def _read(self, mark: str) -> Reading:
        alone = mark == "<function="
        if not alone and (yield from super()._read(mark)):
            return True
        while True:
            if self._over or ">" in self._piece:
                found = tagged.calls(self._text, self._schemas, alone=alone, over=self._over)
                if found is not None or self._over:
                    break
            elif not tagged.begins(self._text, 0 if alone else len(mark)):
                return False
            yield
        calls, end = found or ([], 0)
        for name, arguments in calls:
            self._begin(name, arguments)
        self._text = self._text[end:]
        return bool(calls)


class _PythonCalls(ToolParser):
    """[name(key="value"), …] between two marks, parsed when it is complete."""

    def _read(self, mark: str) -> Reading:
        while (at := self._text.find(self._closes, len(mark))) < 0:
            if self._over:
                return False
            yield
        calls = _python_calls(self._text[len(mark) : at])
        for name, arguments in calls:
            self._begin(name, arguments)
        if calls:
            self._text = self._text[at + len(self._closes) :]
        return bool(calls)


_CONSTANTS = {"true": True, "false": False, "null": None}


class _Constants(ast.NodeTransformer):
    """Replaces true, false and null by Python's constants."""

    def visit_Name(self, node: ast.Name) -> ast.expr:  # the name that ast.NodeTransformer requires
        return ast.Constant(_CONSTANTS[node.id]) if node.id in _CONSTANTS else node


def _python_calls(block: str) -> list[tuple[str, str]]:
    """The calls in such a list; none when it holds anything else."""
    try:
        tree = ast.parse(block.strip(), mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        return [_python_call(call) for call in calls]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []


def _python_call(call: ast.expr) -> tuple[str, str]:
    """The name and the arguments (JSON) of a call. Raises ValueError unless it is a call with named arguments."""
    if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
        raise ValueError
    values = {str(word.arg): ast.literal_eval(_Constants().visit(word.value)) for word in call.keywords}
    return ast.unparse(call.func), json.dumps(values, ensure_ascii=False, allow_nan=False)


_TAGGED_FRAME = ('<tool_call>\n{"name": ', ', "arguments": ', "}\n</tool_call>")
_HERMES = Style(_TaggedCalls, True, _TAGGED_FRAME)
_OTHER_TAGS = Style(_TaggedCalls, True, None)
_LLAMA = Style(
    lambda schemas: _JsonCalls(("<|python_tag|>",), bare=schemas), True, ('{"name": ', ', "parameters": ', "}")
)
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
        lambda _: _JsonCalls(("functools[", "<|tool_call|>"), "<|/tool_call|>"),
        True,
        ('functools[{"name": ', ', "arguments": ', "}]"),
    ),
    "qwen3coder": _OTHER_TAGS,
    "glm4": _OTHER_TAGS,
    "lfm2": Style(lambda _: _PythonCalls(("<|tool_call_start|>",), "<|tool_call_end|>"), True, None),
}
"""The formats by name: OVMS's names for `tool_parser`, and `qwen3`."""

_MARKS = (
    ("<function=", "qwen3coder"),
    ("<arg_key>", "glm4"),
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
    """The name of the parser for a chat template's format; None for a template without tool calls."""
    return next((name for mark, name in _MARKS if mark in template), None)


def parser(name: str, tools: list[dict[str, Any]]) -> ToolParser:
    """A new parser for one answer, by its name in PARSERS and the request's `tools`."""
    functions = [tool["function"] for tool in tools]
    return PARSERS[name].make({function["name"]: function.get("parameters") or {} for function in functions})


def _identity() -> str:
    """A call's id: nine letters or digits, which Mistral's templates require."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))
