"""The package compares classes and ids of errors, never their text."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import engine_plugin

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(engine_plugin.__file__).parent

ALLOWED = {
    "server/servicer.py": "the log does not repeat a line that it has just had",
    "speech/decoder_program.py": "only FFmpeg's text names the part that a file lacks",
}
"""Modules that read the texts of errors, and why."""

_TEXT = {"message", "args", "details", "strerror"}
_READS = {
    "startswith",
    "endswith",
    "removeprefix",
    "removesuffix",
    "partition",
    "rpartition",
    "split",
    "find",
    "index",
}
_PATTERNS = {"search", "match", "fullmatch", "finditer", "findall", "sub"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def errors_in(function: Function) -> set[str]:
    """The names of errors: what handlers catch, and parameters whose annotation ends in Error or Exception."""
    caught = {node.name for node in ast.walk(function) if isinstance(node, ast.ExceptHandler) and node.name}
    arguments = function.args
    given = {
        argument.arg
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        if argument.annotation is not None
        and any(part.strip().endswith(("Error", "Exception")) for part in ast.unparse(argument.annotation).split("|"))
    }
    return caught | given


def has_text(node: ast.AST, errors: set[str], texts: set[str]) -> bool:
    """Whether the text of one of these errors, or one of these names, is part of an expression."""
    for part in ast.walk(node):
        match part:
            case ast.Name(id=name) if name in texts:
                return True
            case ast.Call(func=ast.Name(id="str" | "repr"), args=[ast.Name(id=name)]) if name in errors:
                return True
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in errors and attribute in _TEXT:
                return True
            case ast.FormattedValue(value=ast.Name(id=name)) if name in errors:
                return True
    return False


def compared(source: str) -> Iterator[int]:
    """The lines where the text of an error is compared, searched or taken apart."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, Function):
            continue
        errors = errors_in(function)
        texts: set[str] = set()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.NamedExpr) and has_text(node.value, errors, set()):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                texts |= {target.id for target in targets if isinstance(target, ast.Name)} - errors
        for node in ast.walk(function):
            match node:
                case ast.Compare():
                    parts = [node.left, *node.comparators]
                case ast.Call(func=ast.Attribute(value=value, attr=method)) if method in _READS:
                    parts = [value]
                case ast.Call(func=ast.Attribute(attr=method), args=arguments) if method in _PATTERNS:
                    parts = list(arguments)
                case _:
                    continue
            if any(has_text(part, errors, texts) for part in parts):
                yield node.lineno


@pytest.mark.promise("P33")
def test_package_compares_no_error_text() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = sorted(set(compared(path.read_text(encoding="utf-8"))))
        if lines:
            found[path.relative_to(PACKAGE).as_posix()] = lines
    assert found.keys() == ALLOWED.keys(), f"compare the class or the id of these errors instead: {found}"


@pytest.mark.parametrize(
    "line",
    [
        'if "certificate" in str(error): pass',
        "if str(error) != str(STOPPED): pass",
        "if error.message == other: pass",
        'said = str(error).removeprefix("the engine ")',
        'what, _, fix = f"{error}".partition(". ")',
        'said = str(error)\n        return said.startswith("the")',
        "if _STATUS.search(str(error)): pass",
        "if any(name in str(error).lower() for name in names): pass",
    ],
)
def test_search_finds_comparisons_of_error_text(line: str) -> None:
    caught = f"def do():\n    try:\n        pass\n    except ValueError as error:\n        {line}\n"
    given = f"def do(error: ValueError | None):\n    if error:\n        {line}\n"
    assert list(compared(caught))
    assert list(compared(given))


@pytest.mark.parametrize(
    "line",
    ['raise DownloadError(f"{name}: {error}")', "if error.id == STOPPED.id: pass", "if error.errno in FULL: pass"],
)
def test_search_ignores_other_uses_of_error_text(line: str) -> None:
    assert not list(compared(f"def do():\n    try:\n        pass\n    except OSError as error:\n        {line}\n"))
