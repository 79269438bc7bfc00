"""Count the lines of code of the packages: no blank lines, comments or docstrings.

    .venv/bin/python scripts/code_lines.py [DIRECTORY]    # of another checkout

Prints the lines and modules of each part of engine_plugin/, of openvino_server/, and in all. The generated stubs do
not count. A docstring is any string that is a statement of its own, also below a constant.
"""

from __future__ import annotations

import ast
import sys
import tokenize
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from pins import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["code_lines", "main"]

_PACKAGES = ("engine_plugin", "openvino_server")
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(path: Path) -> int:
    """The lines of a Python file on which there is code."""
    with tokenize.open(path) as file:
        lines = {
            line
            for token in tokenize.generate_tokens(file.readline)
            if token.type not in _LAYOUT
            for line in range(token.start[0], token.end[0] + 1)
        }
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def _part(path: Path) -> str:
    package, *rest = path.parts
    return f"{package}/{rest[0]}" if package == _PACKAGES[0] and len(rest) > 1 else package


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    named = sys.argv[1:2] if arguments is None else arguments
    root = Path(named[0]) if named else ROOT
    lines: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for package in _PACKAGES:
        for path in (root / package).rglob("*.py"):
            if "stubs" not in path.parts:
                part = _part(path.relative_to(root))
                lines[part] += code_lines(path)
                modules[part] += 1
    for part in sorted(lines):
        print(f"{part:28}{lines[part]:7}{modules[part]:5}")
    print(f"{'in all':28}{lines.total():7}{modules.total():5}")


if __name__ == "__main__":
    main()
