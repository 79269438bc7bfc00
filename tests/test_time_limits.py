"""No test depends on the speed of the machine: no wait has a fixed bound, and no elapsed time is compared."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CLOCKS = ("monotonic()", "perf_counter()")
BOUNDED = {"timeout": 0, "wait_for": 1, "wait": 0}
"""Calls whose argument at this place is a bound: asyncio.timeout, asyncio.wait_for, Popen.wait and Event.wait."""
RUNS = {"run", "communicate", "wait_procs", "check_output"}
"""Calls whose `timeout` is a bound."""


def is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def bound_of(call: ast.Call) -> ast.expr | None:
    """What bounds a wait, if this call is one."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    place = BOUNDED.get(name)
    if place is not None and len(call.args) == place + 1:
        return call.args[place]
    named = [keyword.value for keyword in call.keywords if keyword.arg == "timeout"]
    return named[0] if name in RUNS and named else None


def is_race(node: ast.Compare) -> bool:
    """An elapsed time must be less than a number."""
    operands = [node.left, *node.comparators]
    for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
        less = isinstance(operator, ast.Lt | ast.LtE)
        if less and is_number(right) and any(clock in ast.unparse(left) for clock in CLOCKS):
            return True
    return False


class Limits(ast.NodeVisitor):
    """Collects the lines with limits; where a TimeoutError is what a test wants, a short one costs the least."""

    def __init__(self) -> None:
        self.lines: list[int] = []

    def visit_With(self, node: ast.With | ast.AsyncWith) -> None:
        wanted = any("TimeoutError" in ast.unparse(item.context_expr) for item in node.items)
        if not wanted:
            self.generic_visit(node)

    visit_AsyncWith = visit_With  # noqa: N815

    def visit_Call(self, node: ast.Call) -> None:
        bound = bound_of(node)
        if bound is not None and is_number(bound):
            self.lines.append(node.lineno)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if is_race(node):
            self.lines.append(node.lineno)
        self.generic_visit(node)


def limits(source: str) -> list[int]:
    found = Limits()
    found.visit(ast.parse(source))
    return found.lines


@pytest.mark.promise("T6")
def test_no_test_has_a_fixed_number_of_seconds() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{line}"
        for path in sorted(TESTS.rglob("*.py"))
        for line in limits(path.read_text(encoding="utf-8"))
    ]
    assert found == [], "take the limit from tests.patience"


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("asyncio.timeout(5)", [1]),
        ("asyncio.wait_for(work, 0.5)", [1]),
        ("subprocess.run(command, timeout=60)", [1]),
        ("process.wait(10)", [1]),
        ("assert time.monotonic() - began < 2", [1]),
        ("assert 1 < time.monotonic() - began < 2", [1]),
        ("assert time.monotonic() - began > 2", []),
        ("asyncio.timeout(LIMIT)\nasyncio.wait_for(work, pace(0.5))", []),
        ("with pytest.raises(TimeoutError):\n    asyncio.wait_for(work, 0.1)", []),
        ("client.invoke('chat', timeout=1)", []),
    ],
)
def test_search_finds_fixed_limits(source: str, lines: list[int]) -> None:
    assert limits(source) == lines
