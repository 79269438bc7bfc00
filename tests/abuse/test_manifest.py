"""plugin.yaml as a person, a program or an attacker may have left it; any text and any bytes: tests/manifest."""

from __future__ import annotations

import copy
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.manifest import Manifest, document, inspect_manifest, lint
from tests.abuse.examples import JSON
from tests.host.conftest import REPOSITORY
from tests.patience import pace

if TYPE_CHECKING:
    from pathlib import Path

    from engine_plugin.errors import Problem

REAL = (REPOSITORY / "plugin.yaml").read_text(encoding="utf-8")
SHAPE = yaml.safe_load(REAL)
SOON = 10.0


def judge(path: Path, content: bytes) -> Manifest | None:
    """Load the file in bounded time: the result is a manifest, or problems with place and fix."""
    path.write_bytes(content)
    began = time.monotonic()
    manifest, problems = inspect_manifest(path, {})
    linted = lint(path, environ={})
    assert time.monotonic() - began < pace(SOON)
    assert manifest is not None or [one for one in problems if one.severity == "error"]
    assert len(linted) >= len(problems)
    for problem in problems:
        check(problem, path, content)
    if manifest is not None:
        assert json.loads(manifest.to_json())["version"] == "1.0"
        assert manifest.data_dir.is_absolute()
    return manifest


def check(problem: Problem, path: Path, content: bytes) -> None:
    assert problem.file == str(path)
    line_ends = sum(content.count(end.encode()) for end in "\n\r\x85\u2028\u2029")  # those of YAML
    assert 0 <= problem.line <= line_ends + 1
    assert problem.what
    assert problem.fix
    assert len(str(problem)) < 2000
    str(problem).encode()


@pytest.fixture(params=["C", "Python"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML's C parser, where it was built, and the pure one."""
    if request.param == "Python":
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything inside a document."""
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, inner in entries for place in places(inner, (*path, key))]


PLACES = places(SHAPE)


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    """The real manifest with keys dropped, values of other types, keys renamed and parts moved."""
    shape: dict[str, Any] = copy.deepcopy(SHAPE)
    for place in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=4)):
        *above, key = place
        holder: Any = shape
        try:
            for step in above:
                holder = holder[step]
            match draw(st.sampled_from(["drop", "value", "value", "rename", "double", "itself"])):
                case "drop":
                    del holder[key]
                case "value":
                    holder[key] = draw(JSON)
                case "rename" if isinstance(holder, dict):
                    holder[draw(st.text(max_size=8) | st.just(str(key).upper()))] = holder.pop(key)
                case "double" if isinstance(holder, list):
                    holder.append(copy.deepcopy(holder[key]))
                case _:
                    holder[key] = copy.deepcopy(shape)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has taken that place away
    return shape


@pytest.mark.promise("P22")
@given(changed(), st.booleans())
def test_changed_manifest_is_loaded_or_rejected_with_problems(
    tmp_path: Path, shape: dict[str, Any], as_json: bool
) -> None:
    if as_json:
        text = json.dumps(shape, ensure_ascii=False)
    else:
        text = yaml.safe_dump(shape, allow_unicode=True, width=10**6)
    judge(tmp_path / ("plugin.json" if as_json else "plugin.yaml"), text.encode("utf-8", "surrogatepass"))


PIECES = st.sampled_from(
    [
        *(
            "\n",
            "\r",
            "\t",
            "  ",
            ": ",
            "- ",
            "#",
            "---\n",
            "...\n",
            "%YAML 1.1\n",
            "&a ",
            "*a",
            "<<: ",
            "!!int ",
            "!<x> ",
        ),
        *(
            "'",
            '"',
            "[",
            "]",
            "{",
            "}",
            "|\n",
            ">\n",
            "? ",
            "@",
            "`",
            "\\",
            "${HOME}",
            "${",
            "\0",
            "\x07",
            "\x85",
            "\u2028",
        ),
        *(
            "\ufeff",
            "\ufffe",
            "\ud800",
            "0x",
            "1e999",
            ".nan",
            "9" * 400,
            "null",
            "version: '2'\n",
            "\U0001f999",
            "x" * 2000,
        ),
    ]
)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """The real text with pieces inserted, removed or doubled anywhere."""
    text = REAL
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(text)))
        length = draw(st.sampled_from([0, 0, 1, 5, 80]))
        text = text[:at] + draw(PIECES | st.just(text[at : at + length] * 2)) + text[at + length :]
    return text


@pytest.mark.promise("P22")
@pytest.mark.usefixtures("parser")
@given(damaged())
def test_damaged_manifest_text_is_loaded_or_rejected_with_problems(tmp_path: Path, text: str) -> None:
    judge(tmp_path / "plugin.yaml", text.encode("utf-8", "surrogatepass"))


def lines(form: str, count: int) -> str:
    return "".join(form.format(number=number) for number in range(count))


MONSTERS = {
    "unknown keys, nearly known": REAL + lines("provid{number}: 1\n", 9000),
    "unknown keys of a service": REAL.replace(
        "services:\n", "services:\n  - " + lines("timeou{number}: 1\n    ", 9000)
    ),
    "unknown platforms": REAL.replace("platforms:\n", "platforms:\n" + lines("  linux_amd{number}: 1\n", 9000)),
    "services": "services:\n" + lines("  - service_name: cha{number}\n", 4000),
    "lists of wrong things": "services: [" + "1, " * 9000 + "1]",
    "variables": REAL.replace("engine:\n", 'engine:\n  x: "' + "${HOM}" * 50_000 + '"\n'),
    "open variables": REAL.replace("engine:\n", 'engine:\n  x: "' + "${" * 200_000 + '"\n'),
    "a long name": REAL.replace("name:", "name: " + "x" * 900_000 + " #", 1),
    "a long key": REAL + "x" * 900_000 + ": 1\n",
    "a long line that is wrong": "a: " + "'" * 900_001,
    "brackets": "a: " + "[" * 30 + "]" * 30 + "\n" + lines("b{number}: [[[[[[]]]]]]\n", 1000),
    "anchors": lines("a{number}: &a{number} [*a{number}]\n", 3000),
    "one alias again and again": "a: &a {b: c}\n" + lines("x{number}: *a\n", 4000),
    "merges of merges": "a: &a {b: c}\n" + lines("x{number}: &x{number} {{<<: [*a, *a]}}\n", 2000),
    "the same key again": "version: '1.0'\n" * 3000,
    "digits": "version: " + "9" * 900_000,
    "escapes": 'version: "' + "\\u0041" * 150_000 + '"',
    "comments": "#\n" * 500_000 + REAL,
    "blank": " " * 1_000_000,
    "tags": lines("a{number}: !!python/object:os.system x\n", 1500),
    "questions": "? " * 3000,
    "dashes": "- " * 3000,
}


@pytest.mark.promise("P22")
@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("parser", ["C", pytest.param("Python", marks=pytest.mark.thorough)], indirect=True)
@pytest.mark.parametrize("monster", MONSTERS)
def test_manifest_built_to_parse_slowly_is_read_or_rejected_soon(tmp_path: Path, monster: str) -> None:
    """Each below the size that is read at all; `make test-all` has the pure parser read them too."""
    content = MONSTERS[monster].encode()
    assert len(content) <= document.MAX_BYTES
    judge(tmp_path / "plugin.yaml", content)


@pytest.mark.promise("P22")
def test_manifest_of_many_megabytes_is_rejected(tmp_path: Path) -> None:
    assert judge(tmp_path / "plugin.yaml", REAL.encode() + b"#" * 10_000_000) is None


def test_unchanged_manifest_is_valid(tmp_path: Path) -> None:
    """Otherwise the tests above would start from an invalid manifest."""
    assert judge(tmp_path / "plugin.yaml", REAL.encode()) is not None
