"""docs/host.md shows examples/chat.py, and that runs."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.patience import LIMIT

from .conftest import FAKE_PLUGIN, REPOSITORY
from .plugins import make_plugin

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLE = REPOSITORY / "examples" / "chat.py"


def run_example(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=LIMIT)


def test_example_prints_an_answer(tmp_path: Path, fake_environment: dict[str, str]) -> None:
    make_plugin(tmp_path, "fake", program=FAKE_PLUGIN)
    done = run_example(str(tmp_path), "fake", "Hello?", env=fake_environment)
    assert (done.stdout, done.returncode) == ("Hello\n", 0), done.stderr


def test_example_prints_an_answer_of_llama_cpp(tmp_path: Path) -> None:
    """The real plugin, its real engine and the sample model, behind a launcher as a host finds it."""
    pytest.importorskip("xllamacpp", reason="llama.cpp comes with the extra `llamacpp`")
    program = tmp_path / "program.py"
    program.write_text("import sys\nfrom engine_plugin.app import main\nsys.exit(main())\n")
    place = make_plugin(tmp_path / "plugins", "llamacpp-plugin", program=program)
    manifest = yaml.safe_load((place / "plugin.yaml").read_text())
    real = yaml.safe_load((REPOSITORY / "plugins/llamacpp/plugin.yaml").read_text())
    (place / "plugin.yaml").write_text(yaml.safe_dump(real | {"platforms": manifest["platforms"]}))
    # Whether or not this package is installed: what registers its engine.
    registered = tmp_path / "site" / "registered-1.0.dist-info"
    registered.mkdir(parents=True)
    (registered / "METADATA").write_text("Metadata-Version: 2.1\nName: registered\nVersion: 1.0\n")
    engines = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"{name} = {target}\n" for name, target in engines["engine_plugin.engines"].items()]
    (registered / "entry_points.txt").write_text("[engine_plugin.engines]\n" + "".join(lines))
    env = {
        "PYTHONPATH": os.pathsep.join([str(registered.parent), str(REPOSITORY)]),
        "AOG_DATA_DIR": str(tmp_path / "aog"),
    }
    done = run_example(str(tmp_path / "plugins"), "llamacpp-plugin", "Hello?", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_example_prints_the_error(tmp_path: Path, fake_environment: dict[str, str]) -> None:
    make_plugin(tmp_path, "fake")
    done = run_example(str(tmp_path), "fake", "Hello?", env=fake_environment)
    assert done.returncode == 1
    assert "executable does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_page_contains_the_example() -> None:
    page = (REPOSITORY / "docs" / "host.md").read_text()
    assert EXAMPLE.read_text() in page
