"""The Makefile passes on any prompt unchanged, also one with syntax of make, the shell or Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import pins
from tests.patience import LIMIT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("make") is None, reason="needs make and a POSIX shell"
)


def make(folder: Path, *arguments: str) -> str:
    command = ["make", "--no-print-directory", f"PYTHON={sys.executable}", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile with a setup that does nothing and a demo that prints its arguments."""
    shutil.copy(pins.ROOT / "Makefile", tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup.py").touch()
    (tmp_path / "scripts" / "demo.py").write_text("import sys; print(sys.argv[1:])", encoding="utf-8")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    return tmp_path


@pytest.mark.parametrize(
    "prompt",
    ['it\'s "quoted"', "$(shell echo no) $HOME $$ `id`", "a\\b; exit 1 # & | *", "two\nlines", "--help", "Grüße"],
)
def test_prompt_is_passed_unchanged(checkout: Path, prompt: str) -> None:
    assert make(checkout, "demo", f"PROMPT={prompt}").strip() == repr([prompt])


def test_demo_without_a_prompt_has_no_argument(checkout: Path) -> None:
    assert make(checkout, "demo").strip() == "[]"


def test_default_target_is_help_and_lists_every_target(checkout: Path) -> None:
    said = make(checkout)
    for target in ("setup", "demo", "check", "test", "soak", "lint", "protos", "lock", "build", "bench", "clean"):
        assert f"make {target}" in said
