"""Structured outputs: the grammar of a call, and the check that it compiles.

A grammar that does not compile would break the pipeline for all of its calls, and a malicious one can crash the
compiler or keep it busy for ever. Therefore a separate process (`grammar_check`) compiles each grammar first, while
the model continues with its other calls.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from engine_plugin.errors import InvalidRequestError
from engine_plugin.process import guard
from engine_plugin.services.base import optional
from openvino_server.frames import encode, receive

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from openvino_server.pipelines.sampling import Parameters

__all__ = ["Grammar", "Grammars", "wanted"]

_CHECK = (sys.executable, "-P", "-s", "-m", "openvino_server.grammar_check")
_REMEMBERED = 256  # valid grammars that are remembered
_WITHIN = 3.0  # seconds; the pipeline compiles the grammar again, and all calls of the model wait for that
_START_WITHIN = 60.0


class Grammar(NamedTuple):
    """The grammar of an answer: the field of the request that has it, its kind and its text.

    The kinds are json_schema, regex and grammar, and tools: a list of (text before, JSON schema, text after).
    """

    field: str
    kind: str
    value: str | list[tuple[str, str, str]]

    @property
    def key(self) -> str:
        """Identifies the grammar by kind and text."""
        return hashlib.sha256(json.dumps([self.kind, self.value]).encode()).hexdigest()

    def config(self) -> Any:
        """GenAI's StructuredOutputConfig."""
        from openvino_genai import StructuredOutputConfig as Config

        if isinstance(self.value, str):
            return Config(**{self.kind: self.value})
        found: Any = None
        for before, schema, after in self.value:
            one = Config.Concat(Config.ConstString(before), Config.JSONSchema(schema), Config.ConstString(after))
            found = one if found is None else found | one
        return Config(compound_grammar=found)


class Grammars:
    """Checks grammars in a process that is started for the first one, and remembers the valid ones.

    For each grammar for which `is_good` was False, `on_result` is called from another thread with its key and its
    error ("" for a valid one).
    """

    def __init__(self, path: Path, on_result: Callable[[str, str], None]) -> None:
        self._path = path
        self._on_result = on_result
        self._good: OrderedDict[str, None] = OrderedDict()
        self._asked: set[str] = set()
        self._checks = ThreadPoolExecutor(1, "grammars")
        self._process: subprocess.Popen[bytes] | None = None

    def is_good(self, grammar: Grammar) -> bool:
        """Whether it is known to be valid. If not, the check begins, and `on_result` gets the result."""
        key = grammar.key
        if key in self._good:
            self._good.move_to_end(key)
            return True
        if key not in self._asked:
            self._checks.submit(self._work, grammar)
            self._asked.add(key)
        return False

    def learn(self, key: str, complaint: str) -> None:
        """Take a result, on the thread of `is_good`. Errors are not remembered: a busy machine may be their cause."""
        self._asked.discard(key)
        if not complaint:
            self._good[key] = None
            if len(self._good) > _REMEMBERED:
                self._good.popitem(last=False)

    def _work(self, grammar: Grammar) -> None:
        try:
            complaint = self._check(grammar)
        except Exception as error:  # noqa: BLE001  # a call waits for the result
            complaint = f"it cannot be checked: {error}"
        self._on_result(grammar.key, complaint)

    def _check(self, grammar: Grammar) -> str:
        """The error of a grammar; "" when it is valid."""
        if self._process is None:
            self._process = subprocess.Popen(
                _CHECK,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, guard.PARENT_VARIABLE: str(os.getpid())},
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
            self._ask(self._process, str(self._path), _START_WITHIN)
        complaint = self._ask(self._process, grammar, _WITHIN)
        if complaint is None:
            code, self._process = self._process.wait(), None
            return f"the compiler ended with {code}, or was ended after {_WITHIN:g} s; make it simpler"
        return complaint

    @staticmethod
    def _ask(process: subprocess.Popen[bytes], what: Any, within: float) -> str | None:
        """The answer of the process; None when it has ended, or was killed after `within` seconds."""
        assert process.stdin is not None  # noqa: S101
        assert process.stdout is not None  # noqa: S101
        timer = threading.Timer(within, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(encode((what if isinstance(what, str) else tuple(what),)))
            process.stdin.flush()
            (answer,) = receive(process.stdout.fileno())
        except (OSError, EOFError):
            process.kill()
            return None
        finally:
            timer.cancel()
        return str(answer)


def wanted(params: Parameters) -> Grammar | None:
    """The grammar that a call's parameters ask for. Raises InvalidRequestError."""
    form = params.get("response_format")
    if form is not None:
        return _response_format(form)
    nested = optional(params, "structured_outputs", dict) or optional(params, "guided_decoding", dict) or {}
    for name, kind in (("json", "json_schema"), ("regex", "regex"), ("grammar", "grammar"), ("choice", "choice")):
        for field, value in ((f"guided_{name}", params.get(f"guided_{name}")), (name, nested.get(name))):
            if value is not None:
                return _grammar(field, kind, value)
    return _grammar("grammar", "grammar", params["grammar"]) if params.get("grammar") else None


def _response_format(form: dict[str, Any]) -> Grammar | None:
    field, kind = "response_format", form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _grammar(field, "json_schema", form.get("schema") or {"type": "object"})
    if kind == "json_schema":
        given = form.get("json_schema")
        schema = given.get("schema") if isinstance(given, dict) and "schema" in given else given or form.get("schema")
        if not isinstance(schema, dict):
            raise InvalidRequestError.at(f"{field}.json_schema", "must be an object with a schema")
        return _grammar(field, "json_schema", schema)
    if kind == "regex":
        return _grammar(field, "regex", form.get("pattern") or form.get("regex"))
    if kind in ("grammar", "ebnf"):
        return _grammar(field, "grammar", form.get("grammar") or form.get("ebnf"))
    raise InvalidRequestError.at(f"{field}.type", "must be one of text, json_object, json_schema, regex, grammar")


def _grammar(field: str, kind: str, value: Any) -> Grammar:
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            raise InvalidRequestError.at(field, "must be a list of strings")
        kind, value = "grammar", "root ::= " + " | ".join(json.dumps(item, ensure_ascii=False) for item in value)
    elif kind == "json_schema" and isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str) or not value:
        or_schema = " or a schema" if kind == "json_schema" else ""
        raise InvalidRequestError.at(field, f"must be a string{or_schema}, not empty")
    if "\0" in value:
        raise InvalidRequestError.at(field, "must not contain the character U+0000")
    return Grammar(field, kind, value)
