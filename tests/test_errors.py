"""The error tree is what its page says, and what the wire can carry."""

from __future__ import annotations

import re

import pytest

from engine_plugin import errors
from engine_plugin.errors import EnginePluginError, ManifestError, Problem, error_for_code

LINE = re.compile(r"^(?P<bars>[ │├└─]*)(?P<name>\w+Error)(?: +(?P<code>\d{3}|code \d{3}))?", re.MULTILINE)


def documented() -> dict[str, tuple[str, int]]:
    """Each class in the module's tree: its parent's name and its code."""
    tree: dict[str, tuple[str, int]] = {}
    path: list[tuple[int, str, int]] = []
    for found in LINE.finditer(errors.__doc__ or ""):
        depth, name = len(found["bars"]), found["name"]
        while path and path[-1][0] >= depth:
            path.pop()
        parent, inherited = (path[-1][1], path[-1][2]) if path else ("Exception", 500)
        code = int(found["code"].removeprefix("code ")) if found["code"] else inherited
        tree[name] = (parent, code)
        path.append((depth, name, code))
    return tree


def classes() -> dict[str, type[EnginePluginError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, EnginePluginError)
    }


def test_the_tree_is_the_one_in_the_docstring() -> None:
    real = {name: (cls.__bases__[0].__name__, cls.code) for name, cls in classes().items()}
    assert len(real) > 15
    assert documented() == real


def test_all_is_everything() -> None:
    others = {"Problem", "error_about", "error_for_code", "ERROR_FIELDS", "ERROR_ID", "MOST_FIELDS"}
    assert set(errors.__all__) == {*classes(), *others}
    assert all(cls.__doc__ for cls in classes().values())


@pytest.mark.parametrize("code", sorted({cls.code for cls in classes().values()}))
def test_a_code_comes_back_as_a_class_of_that_code(code: int) -> None:
    error = error_for_code(code, "why")
    assert (error.code, error.message, str(error)) == (code, "why", "why")


@pytest.mark.parametrize("code", [1, 201, 418, 599, -1])
def test_an_unknown_code_is_an_error_all_the_same(code: int) -> None:
    assert type(error_for_code(code, "why")) is EnginePluginError


def test_a_manifests_problems_are_its_lines() -> None:
    error = ManifestError([Problem("plugin.yaml", 3, "a is wrong", "Set b."), Problem("plugin.yaml", 0, "c", "d.")])
    assert error.message.splitlines() == [
        "plugin.yaml:3: error: a is wrong. Set b.",
        "plugin.yaml: error: c. d.",
    ]
    assert len(error.problems) == 2
