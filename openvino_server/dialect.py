"""Divides an answer into reasoning, text and tool calls, by the marks that the model's template uses.

`Dialect` finds the marks; `Deltas` divides an answer piece by piece into OpenAI's deltas.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from openvino_server.errors import RequestError
from openvino_server.pipelines.text import held_back
from openvino_server.tool_calls import PARSERS, ToolParser, Tools, guess, parser

__all__ = ["THOUGHT", "Deltas", "Dialect", "Plan"]

_THINK = "<think>"
THOUGHT = "</think>"
"""The mark that ends the reasoning in an answer."""

_REASONING = ("qwen3", "deepseek_r1", "lfm2", "think")


class Plan(NamedTuple):
    """How to divide the answer of one call: the parser and the tools of its tool calls, and its reasoning.

    `reasons`: it may contain reasoning; `thinking`: it begins inside it; `special`: special tokens must be decoded.
    """

    parser: str | None
    tools: list[dict[str, Any]]
    reasons: bool
    thinking: bool
    special: bool

    def deltas(self) -> Deltas:
        """A new divider for one stream of the call."""
        made = parser(self.parser, self.tools) if self.parser else None
        return Deltas(made, self.reasons, self.thinking)


class Dialect:
    """The marks of a model, from its options, else its template. Raises RequestError for an unknown parser."""

    def __init__(self, template: str, options: dict[str, Any]) -> None:
        self._parser: str | None = options.get("tool_parser") or guess(template)
        if self._parser and self._parser not in PARSERS:
            raise RequestError(f"tool_parser: {self._parser!r} is not one of {', '.join(PARSERS)}")
        reasoning = options.get("reasoning_parser")
        if reasoning and reasoning not in _REASONING:
            raise RequestError(f"reasoning_parser: {reasoning!r} is not one of {', '.join(_REASONING)}")
        self._reasons = bool(reasoning) or THOUGHT in template

    def plan(self, tools: Tools, prompt: str, guided: bool) -> Plan | None:
        """The plan for a call; None if all of the answer is text. A `guided` answer has no reasoning."""
        name = self._parser if tools.offered else None
        reasons = self._reasons and not guided
        if not name and not reasons:
            return None
        thinking = reasons and prompt.rstrip().endswith(_THINK)
        special = name is not None and PARSERS[name].special
        return Plan(name, tools.offered, reasons, thinking, special)

    def forced(self, tools: Tools) -> list[tuple[str, str, str]]:
        """Each forced tool: text before the arguments, their JSON schema, text after them. Raises RequestError."""
        if not tools.forced:
            return []
        frame = PARSERS[self._parser].frame if self._parser else None
        if frame is None:
            raise RequestError("tool_choice: this model's tool calls cannot be forced; use auto")
        before, between, after = frame
        found = []
        for tool in tools.forced:
            function = tool["function"]
            begin = before + json.dumps(function["name"], ensure_ascii=False) + between
            schema = json.dumps(function.get("parameters") or {"type": "object"}, ensure_ascii=False)
            found.append((begin, schema, after))
        return found


class Deltas:
    """Divides the text of one answer into OpenAI's deltas: text, `reasoning_content`, `tool_calls`."""

    def __init__(self, parser: ToolParser | None, reasons: bool, thinking: bool) -> None:
        self._parser = parser
        self._reasons = reasons
        self._thinking = thinking
        self._began = thinking
        self._held = ""
        self._fresh = True  # white space around reasoning is dropped

    def feed(self, text: str) -> list[Any]:
        """The deltas that this piece of text completes."""
        if not self._reasons:
            return self._plain(text)
        text, self._held = self._held + text, ""
        if not self._began:
            bare = text.lstrip()
            if not bare.startswith(_THINK):
                if _THINK.startswith(bare):
                    self._held = text
                    return []
                self._reasons = False
                return self._plain(text)
            self._began = self._thinking = True
            text = bare[len(_THINK) :]
        thought, mark, rest = text.partition(THOUGHT)
        if self._fresh:
            thought = thought.lstrip()
        shown = thought[: len(thought) - (0 if mark else held_back(thought, THOUGHT))].rstrip()
        if shown:
            self._fresh = False
        found = [{"reasoning_content": shown}] if shown else []
        if not mark:
            self._held = thought[len(shown) :]
            return found
        self._reasons = self._thinking = False
        self._fresh = True
        return found + self._plain(rest)

    def end(self) -> list[Any]:
        """The last deltas, at the end of the text."""
        held, self._held = self._held, ""
        if self._thinking:
            found: list[Any] = [{"reasoning_content": held}] if held.strip() else []
        else:
            found = self._plain(held)
        return found + (self._parser.end() if self._parser is not None else [])

    def finish(self, reason: str) -> str:
        """OpenAI's finish_reason for the pipeline's `reason`: `tool_calls` after a call."""
        called = self._parser is not None and self._parser.called
        return "tool_calls" if called and reason == "stop" else reason

    def _plain(self, text: str) -> list[Any]:
        if self._fresh and self._began:
            text = text.lstrip("\n")
        if not text:
            return []
        self._fresh = False
        return self._parser.feed(text) if self._parser is not None else [text]
