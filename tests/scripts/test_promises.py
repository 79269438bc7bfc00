"""Each promise of docs/reliability.md has tests, and each mismatch of page and tests is reported."""

from __future__ import annotations

from textwrap import dedent
from typing import TYPE_CHECKING

import pytest

import promises

if TYPE_CHECKING:
    from pathlib import Path

PAGE = """\
# Page

- **F1** The first,
  in two lines.
- **F2** The second.

A text between.

- **P10** The third.
"""


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    """A folder with tests of every form that can have a marker."""
    folder = tmp_path / "tests"
    (folder / "engines").mkdir(parents=True)
    (folder / "engines" / "test_a.py").write_text(
        dedent("""
            import pytest

            @pytest.mark.promise("F1", "F2")
            @pytest.mark.slow
            def test_plain(): ...

            @pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.promise("P10"))])
            async def test_parameter(x): ...

            def test_without(): ...

            @pytest.mark.promise("F1")
            def helper(): ...

            @pytest.mark.promise("F2")
            class TestClass:
                @pytest.mark.promise("F1")
                async def test_inside(self): ...

                def test_beside(self): ...
            """)
    )
    (folder / "test_b.py").write_text(
        'import pytest\npytestmark = [pytest.mark.slow, pytest.mark.promise("F2")]\ndef test_one(): ...\n'
    )
    return folder


FILLED = """\
# Page

- **F1** The first,
  in two lines.
  - `tests/engines/test_a.py`: test_plain, TestClass.test_inside
- **F2** The second.
  - `tests/engines/test_a.py`: test_plain, TestClass.test_inside, TestClass.test_beside
  - `tests/test_b.py`: every test

A text between.

- **P10** The third.
  - `tests/engines/test_a.py`: test_parameter
"""


def test_tests_are_listed_below_their_promise(tests: Path) -> None:
    kept = promises.marked(tests)
    assert promises.fill_in(PAGE, kept) == FILLED
    assert promises.fill_in(FILLED, kept) == FILLED
    assert promises.fill_in(FILLED, []) == PAGE
    assert promises.problems(PAGE, kept) == []


def test_long_list_is_wrapped() -> None:
    kept = [promises.Kept("F1", "tests/test_a.py", f"test_{'x' * number}", 1) for number in range(20, 40)]
    filled = promises.fill_in(PAGE, kept)
    assert max(map(len, filled.splitlines())) <= 118
    assert all(one.test in filled.replace("\n    ", " ") for one in kept)
    assert promises.fill_in(filled, []) == PAGE


def test_promise_without_a_test_is_reported(tests: Path) -> None:
    kept = [one for one in promises.marked(tests) if one.promise != "P10"]
    assert promises.problems(PAGE, kept) == ["reliability.md: no test keeps P10"]


def test_marker_for_an_unknown_promise_is_reported(tests: Path) -> None:
    kept = [*promises.marked(tests), promises.Kept("F9", "tests/test_c.py", "test_x", 7)]
    complaint = "tests/test_c.py:7: test_x keeps F9, which reliability.md does not promise"
    assert promises.problems(PAGE, kept) == [complaint]


@pytest.mark.parametrize("marker", ["pytest.mark.promise()", "pytest.mark.promise(NAME)", "pytest.mark.promise(7)"])
def test_marker_without_a_literal_name_is_reported(tmp_path: Path, marker: str) -> None:
    (tmp_path / "test_a.py").write_text(f"import pytest\n@{marker}\ndef test_x(): ...\n")
    assert promises.problems("", promises.marked(tmp_path)) == [f"{tmp_path.name}/test_a.py:2: {promises.NAMELESS}"]


def test_duplicate_promise_is_reported() -> None:
    kept = [promises.Kept("F1", "tests/test_a.py", "test_x", 1)]
    assert promises.problems("- **F1** One.\n- **F1** Two.\n", kept) == ["reliability.md: F1 is promised twice"]


def test_outdated_page_fails_the_check(
    tests: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tests.parent / "reliability.md"
    page.write_text(PAGE)
    monkeypatch.setattr(promises, "PAGE", page)
    kept = promises.marked(tests)
    monkeypatch.setattr(promises, "marked", lambda: kept)
    assert promises.main(["--check"]) == 1
    assert "out of date: run python scripts/promises.py" in capsys.readouterr().err
    assert page.read_text() == PAGE
    assert promises.main([]) == 0
    assert page.read_text() == FILLED
    assert promises.main(["--check"]) == 0


def test_every_promise_has_tests_and_the_page_is_up_to_date() -> None:
    """If not: python scripts/promises.py."""
    page, kept = promises.PAGE.read_text(encoding="utf-8"), promises.marked()
    assert promises.problems(page, kept) == []
    assert promises.fill_in(page, kept) == page
