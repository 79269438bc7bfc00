"""Write into docs/reliability.md which tests keep each promise.

A test names the promises that it keeps: `@pytest.mark.promise("F7", "G32")`. The page has one list item a promise,
which begins with its name in bold; below each one this program lists the tests, file by file. With `--check` it
writes nothing and fails when the page is out of date, a promise has no test, or a test names a promise that the page
does not make.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pins import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["PAGE", "Kept", "fill_in", "main", "marked", "problems"]

PAGE = ROOT / "docs" / "reliability.md"
TESTS = ROOT / "tests"

_WIDTH = 118
_PROMISE = re.compile(r"- \*\*([A-Z][0-9]+)\*\* ")
_TESTS_OF_A_FILE = re.compile(r"  - `tests/")
_BELOW = "    "
WHOLE_FILE = "every test"
NAMELESS = "a promise's name must be written out, as text"


@dataclass(frozen=True)
class Kept:
    """A test keeps a promise. `promise` is "" where the marker does not say which one."""

    promise: str
    file: str
    """From the repository's root on, with slashes."""
    test: str
    line: int


def _promises(expression: ast.expr) -> Iterator[tuple[str, int]]:
    """What the markers in an expression name: a decorator, a list of marks, a parameter with marks."""
    for node in ast.walk(expression):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.promise"):
            for argument in node.args or [node]:
                constant = argument.value if isinstance(argument, ast.Constant) else ""
                yield constant if isinstance(constant, str) else "", node.lineno


def _in_module(file: str, module: ast.Module) -> Iterator[Kept]:
    def below(body: list[ast.stmt], inherited: list[tuple[str, int]], prefix: str) -> Iterator[Kept]:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            own = [found for decorator in node.decorator_list for found in _promises(decorator)]
            if isinstance(node, ast.ClassDef):
                yield from below(node.body, inherited + own, f"{prefix}{node.name}.")
            elif node.name.startswith("test_"):
                yield from (Kept(name, file, prefix + node.name, line) for name, line in inherited + own)

    for node in module.body:
        if isinstance(node, ast.Assign) and "pytestmark" in (ast.unparse(target) for target in node.targets):
            yield from (Kept(name, file, WHOLE_FILE, line) for name, line in _promises(node.value))
    yield from below(module.body, [], "")


def marked(tests: Path = TESTS) -> list[Kept]:
    """Every marker of the tests, in the order of files and lines. The tests are read, not imported."""
    found: list[Kept] = []
    for path in sorted(tests.rglob("test_*.py")):
        file = path.relative_to(tests.parent).as_posix()
        found += _in_module(file, ast.parse(path.read_bytes(), str(path)))
    return found


def _lines(tests: Iterable[Kept]) -> Iterator[str]:
    """The list of one promise's tests."""
    files: dict[str, dict[str, None]] = {}
    for kept in tests:
        files.setdefault(kept.file, {})[kept.test] = None
    for file, names in files.items():
        text = f"  - `{file}`: {', '.join(names)}"
        yield from textwrap.wrap(
            text, _WIDTH, subsequent_indent=_BELOW, break_long_words=False, break_on_hyphens=False
        )


def _without_tests(page: str) -> Iterator[str]:
    skipping = False
    for line in page.splitlines():
        skipping = bool(_TESTS_OF_A_FILE.match(line)) or (skipping and line.startswith(_BELOW))
        if not skipping:
            yield line


def fill_in(page: str, kept: Iterable[Kept]) -> str:
    """The page with the tests of each promise below it, whatever was listed there before."""
    by_promise: dict[str, list[Kept]] = {}
    for one in kept:
        by_promise.setdefault(one.promise, []).append(one)
    lines: list[str] = []
    waiting: list[str] = []
    for line in [*_without_tests(page), ""]:
        if waiting and not line.startswith("  "):  # the promise's own text has ended
            lines += _lines(by_promise.get(waiting.pop(), []))
        if found := _PROMISE.match(line):
            waiting.append(found[1])
        lines.append(line)
    return "\n".join(lines[:-1]) + "\n"


def problems(page: str, kept: list[Kept]) -> list[str]:
    """What does not fit together between the page's promises and the tests' markers."""
    names = [found[1] for line in page.splitlines() if (found := _PROMISE.match(line))]
    complaints = [f"{PAGE.name}: {name} is promised twice" for name in sorted({*names}) if names.count(name) > 1]
    for one in kept:
        place = f"{one.file}:{one.line}"
        if not one.promise:
            complaints.append(f"{place}: {NAMELESS}")
        elif one.promise not in names:
            complaints.append(f"{place}: {one.test} keeps {one.promise}, which {PAGE.name} does not promise")
    without = [name for name in names if name not in {one.promise for one in kept}]
    return complaints + [f"{PAGE.name}: no test keeps {name}" for name in without]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something is amiss")
    check = parser.parse_args(arguments).check
    page, kept = PAGE.read_text(encoding="utf-8"), marked()
    complaints = problems(page, kept)
    fresh = fill_in(page, kept)
    if check and fresh != page:
        complaints.append(f"{PAGE.name} is out of date: run python scripts/promises.py")
    if not check and fresh != page:
        PAGE.write_text(fresh, encoding="utf-8", newline="\n")
    for complaint in complaints:
        print(f"promises: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
