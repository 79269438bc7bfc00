"""docs/host.md shows examples/chat.py, and that runs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from .conftest import FAKE_PLUGIN, REPOSITORY
from .plugins import make_plugin

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLE = REPOSITORY / "examples" / "chat.py"


def run_example(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=60)


def test_the_example_answers(tmp_path: Path, fake_environment: dict[str, str]) -> None:
    make_plugin(tmp_path, "fake", program=FAKE_PLUGIN)
    done = run_example(str(tmp_path), "fake", "Hello?", env=fake_environment)
    assert (done.stdout, done.returncode) == ("Hello\n", 0), done.stderr


def test_the_example_says_what_is_wrong(tmp_path: Path, fake_environment: dict[str, str]) -> None:
    make_plugin(tmp_path, "fake")
    done = run_example(str(tmp_path), "fake", "Hello?", env=fake_environment)
    assert done.returncode == 1
    assert "executable does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_page_shows_the_example() -> None:
    page = (REPOSITORY / "docs" / "host.md").read_text()
    assert EXAMPLE.read_text() in page
