"""Files that no manifest can be read from, and what a scalar means."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from engine_plugin.errors import ManifestError
from engine_plugin.manifest import load_manifest
from engine_plugin.manifest.document import INVALID, MAX_BYTES, MAX_DEPTH, MAX_VALUES, read_document

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + previous] * 9)}]\n"
    for previous, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture(params=["C", "Python"], autouse=True)
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with PyYAML's C parser, where it was built, and with the pure one."""
    if request.param == "Python":
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)


@pytest.mark.promise("P22")
@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 0, "is empty"),
        ("# only a comment\n", 0, "is empty"),
        ("---\n", 0, "is empty"),
        ("just a text\n", 1, "the file is not a mapping"),
        ("\n- a\n- b\n", 2, "the file is not a mapping"),
        (b"version: \xff\n", 1, "not UTF-8"),
        (b"a: b\nc: \xc3\n", 2, "not UTF-8"),
        (b"a: b\nc: \x07\n", 2, "U+0007"),
        ('a: b\nc: "\\0"\n', 2, "NUL"),
        ("a: b\nc: d: e\n", 2, "not valid YAML"),
        ('a: b\nc: "open\nd: e\n', 2, "not valid YAML"),
        ("a:\n  b: c\n\td: e\n", 3, "spaces, not with tabs"),
        ("a: [1, 2\n", 1, "not valid YAML"),
        ('a: b\nc: "open\nd: e\n\n\n', 2, "not valid YAML"),
        ('a: "\\UFFFFFFFF"\n', None, "not valid YAML"),
        ("%YAML 7.0\n---\na: b\n", None, "not valid YAML"),
        ("a: b\na: c\n", 2, "duplicate key 'a', first defined in line 1"),
        ("a:\n  b: 1\n  c: 2\n  b: {d: 3}\n", 4, "duplicate key 'b', first defined in line 2"),
        ('{"a": 1,\n "a": 2}\n', 2, "duplicate key 'a'"),
        ("a: &x [1]\nb: *x\n", 2, "alias *x"),
        (BOMB, 2, "alias *a"),
        ("a: &a [*a]\n", 1, "alias *a"),
        ("<<: {a: b}\n", 1, "merge keys"),
        ("a: b\n? [c]\n: d\n", 2, "a key is not a scalar"),
        ("a: !!python/object/apply:os.system [id]\n", 1, "tag"),
        ("a: !!int '5'\n", 1, "tag"),
        ("a: b\n---\nc: d\n", 2, "second document"),
        ("a: .nan\n", 1, "finite"),
        ("a: 1.0e999\n", 1, "finite"),
        ("a: " + "[" * (MAX_DEPTH + 1), 1, "nested more than"),
        ("[" * 100_000, 1, "nested more than"),
        ("- x\n" * (MAX_VALUES + 1), MAX_VALUES, "values"),
        ("# " + "x" * MAX_BYTES, 0, "larger than 1 MiB"),
    ],
)
def test_unreadable_file_is_reported_with_place_and_fix(
    write: Callable[..., Path], text: str | bytes, line: int | None, words: str
) -> None:
    with pytest.raises(ManifestError) as caught:
        load_manifest(write(text), {})
    problem = next(problem for problem in caught.value.problems if words in f"{problem.what}. {problem.fix}")
    assert problem.fix
    assert problem.file.endswith("plugin.yaml")
    if line is not None:
        assert problem.line == line


def test_problem_inside_a_document_is_reported_once(write: Callable[..., Path]) -> None:
    text = 'version: *v\nprovider: &p {name: x, version: "1", type: remote}\nservices: [*p]\nplatforms: *p\n'
    with pytest.raises(ManifestError) as caught:
        load_manifest(write(text), {})
    assert [(problem.line, "alias" in problem.what) for problem in caught.value.problems] == [
        (1, True),
        (3, True),
        (4, True),
    ]


def test_path_that_is_not_a_file_is_rejected(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.yaml", tmp_path / "a\0b", tmp_path / ("x" * 5000)):
        with pytest.raises(ManifestError, match=r"regular file|cannot be read"):
            load_manifest(path, {})


@pytest.mark.promise("P22")
@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFOs in the file system")
def test_fifo_is_rejected_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "plugin.yaml"
    os.mkfifo(path)
    with pytest.raises(ManifestError, match="regular file"):
        load_manifest(path, {})


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_file_without_read_permission_is_rejected(write: Callable[..., Path]) -> None:
    path = write()
    path.chmod(0)
    with pytest.raises(ManifestError, match="Permission denied"):
        load_manifest(path, {})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("on", "on"),
        ("0", 0),
        ("-12", -12),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", "017"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1.0.0", "1.0.0"),
        ("2024-01-01", "2024-01-01"),
        ("9" * 5000, "9" * 5000),
        ('"1"', "1"),
        ("'true'", "true"),
        ("|\n  two\n  lines", "two\nlines\n"),
        ("[1, [a]]", [1, ["a"]]),
        ("&anchor here", "here"),
    ],
)
def test_scalar_is_read_with_its_type(write: Callable[..., Path], text: str, value: Any) -> None:
    _, data, problems = read_document(write(f"key: {text}\n"))
    assert problems == []
    assert data == {"key": value}
    assert type(data["key"]) is type(value)


def test_line_of_a_path_or_its_nearest_parent_is_found(write: Callable[..., Path]) -> None:
    source, _, _ = read_document(write(b"\xef\xbb\xbfa: 1\r\nb:\r\n  c:\r\n    - x\r\n    - {d: e}\r\n"))
    assert source.line(("a",)) == 1
    assert source.line(("b", "c")) == 3
    assert source.line(("b", "c", 1)) == source.line(("b", "c", 1, "d")) == 5
    assert source.line(("b", "c", 7, "deeper")) == 3, "the nearest parent"
    assert source.line(("nowhere",)) == 1


def test_json_with_tabs_and_escapes_is_read(write: Callable[..., Path]) -> None:
    path = write('{\n "a": "\\u00e9\\/\\n",\n "b": [1, 2.5, null, true]\n}\n', "plugin.json")
    source, data, problems = read_document(path)
    assert problems == []
    assert data == {"a": "é/\n", "b": [1, 2.5, None, True]}
    assert source.line(("b",)) == 3


def test_file_without_a_document_has_no_data(write: Callable[..., Path]) -> None:
    source, data, problems = read_document(write(""))
    assert data is INVALID
    assert len(problems) == 1
    assert source.line(()) == 0
