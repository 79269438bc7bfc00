"""The error tree matches its page and what the wire can carry."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path

import pytest

import error_ids
from engine_plugin import catalogue, errors
from engine_plugin.catalogue import CATALOGUE
from engine_plugin.errors import (
    ERROR_FIELDS,
    MOST_FIELDS,
    EnginePluginError,
    InvalidRequestError,
    ManifestError,
    ModelNotFoundError,
    Problem,
    PullError,
    error_about,
    error_for_code,
)
from engine_plugin.redaction import entered

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


def test_error_tree_matches_the_docstring() -> None:
    real = {name: (cls.__bases__[0].__name__, cls.code) for name, cls in classes().items()}
    assert len(real) > 15
    assert documented() == real


def test_all_lists_every_error() -> None:
    others = {"Problem", "error_about", "error_for_code", "ERROR_FIELDS", "ERROR_ID", "MOST_FIELDS"}
    assert set(errors.__all__) == {*classes(), *others}
    assert all(cls.__doc__ for cls in classes().values())


@pytest.mark.parametrize("code", sorted({cls.code for cls in classes().values()}))
def test_error_code_restores_a_class_of_that_code(code: int) -> None:
    error = error_for_code(code, "why")
    assert (error.code, error.message, str(error)) == (code, "why", "why")


@pytest.mark.parametrize("code", [1, 201, 418, 599, -1])
def test_unknown_code_restores_the_base_class(code: int) -> None:
    assert type(error_for_code(code, "why")) is EnginePluginError


def test_manifest_error_lists_its_problems_by_line() -> None:
    error = ManifestError([Problem("plugin.yaml", 3, "a is wrong", "Set b."), Problem("plugin.yaml", 0, "c", "d.")])
    assert error.message.splitlines() == [
        "plugin.yaml:3: error: a is wrong. Set b.",
        "plugin.yaml: error: c. d.",
    ]
    assert len(error.problems) == 2


# Ids and fields


def test_each_error_class_has_a_unique_id() -> None:
    names = [cls.__dict__["id"] for cls in classes().values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names)


def test_fields_without_a_value_are_omitted() -> None:
    assert ModelNotFoundError("why", model="m", pull="").fields == {"model": "m"}
    assert ModelNotFoundError("why", count=0, none=None).fields == {"count": 0}


def test_request_error_has_the_field_and_the_reason() -> None:
    error = InvalidRequestError.at("messages[0].content", "must be a string")
    assert error.message == "messages[0].content: must be a string"
    assert error.fields == {"field": "messages[0].content"}


def test_manifest_error_has_the_place_of_its_first_problem() -> None:
    assert ManifestError([Problem("plugin.yaml", 3, "a", "b")]).fields == {"file": "plugin.yaml", "line": 3}
    assert ManifestError([Problem("plugin.yaml", 0, "a", "b")]).fields == {"file": "plugin.yaml"}


def test_error_is_converted_to_another_class() -> None:
    error = catalogue.DISK_FILLED.error(folder="/srv", reason="full", arrived=1, free="0 bytes are free")
    told = PullError.from_error(error, "no room")
    assert (type(told), told.id, str(told), told.fields) == (PullError, "disk-filled", "no room", {"folder": "/srv"})
    assert PullError.from_error(errors.DownloadError("why")).id == "pull-failed"


def test_error_names_its_service_and_model() -> None:
    with pytest.raises(ModelNotFoundError) as caught, error_about(model="outer", service="chat", none=""):
        raise ModelNotFoundError("why", model="m")
    assert caught.value.fields == {"model": "m", "service": "chat"}


@pytest.mark.parametrize(
    "value",
    ["é\n\x7f\x00\u2028", "\ud800", "🦙" * 600, "m" * 5000, Path("/srv/models"), math.inf, 1.5, True, 1 << 40],
)
def test_metadata_is_valid_for_grpc(value: object) -> None:
    error = EnginePluginError("why", first=1, value=value)
    text = error.metadata[ERROR_FIELDS]
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= MOST_FIELDS
    shown = json.loads(text)
    assert shown["first"] == 1
    assert shown.keys() <= {"first", "value"}


def test_fields_beyond_the_size_limit_are_dropped() -> None:
    error = EnginePluginError("why", **{f"f{number}": "x" * 900 for number in range(4)})
    assert list(json.loads(error.metadata[ERROR_FIELDS])) == ["f0", "f1"]


def test_metadata_has_no_secrets() -> None:
    entered("s3cret-of-mine")
    error = EnginePluginError("why", url="https://me:pass@host/?token=abc", key="x s3cret-of-mine y")
    assert json.loads(error.metadata[ERROR_FIELDS]) == {"url": "https://***@host/?token=***", "key": "x *** y"}


# What docs/errors.md says


def named_fields() -> list[tuple[str, type[EnginePluginError], set[str]]]:
    """Each error that the package makes of a class: where, of which, and the fields that it gives."""
    found = []
    for path in sorted(Path(errors.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes():
                given = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
                found.append((f"{path.name}:{node.lineno}", classes()[node.func.id], given))
    return found


def test_errors_have_only_documented_fields() -> None:
    uses = named_fields()
    assert any(given for _, _, given in uses)
    for place, kind, given in uses:
        assert given <= set(kind.names), f"{place}: {kind.__name__}"


def test_page_of_error_ids_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_ids.main(["--check"]) == 0, capsys.readouterr().err


def test_page_lists_each_error_id_once() -> None:
    rows = re.findall(r"^\| \[?`([a-z-]+)`", error_ids.page(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == {cls.id for cls in classes().values()} | CATALOGUE.keys()
    assert all(cls.remedy.endswith(".") for cls in classes().values())


def test_error_id_belongs_to_one_class() -> None:
    """A class may have an entry of the catalogue, for its usual text."""
    for cls in classes().values():
        if cls.id in CATALOGUE:
            assert CATALOGUE[cls.id].raises is cls
