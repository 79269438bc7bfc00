"""The decisions of setup without an installation; CI's clean clone tests the rest."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from typing import TYPE_CHECKING

import pytest

import pins
import setup
from tests.patience import LIMIT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment without pip."""
    environment = tmp_path_factory.mktemp("environments") / ".venv"
    venv.create(environment, symlinks=sys.platform != "win32", with_pip=False)
    return environment


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment that setup takes for complete."""
    interpreter = setup.interpreter(tmp_path)
    interpreter.parent.mkdir()
    interpreter.touch()
    write_stamp(tmp_path, "dev", setup.fingerprint())
    return tmp_path


def write_stamp(environment: Path, profile: str, fingerprint: str) -> None:
    text = json.dumps({"profile": profile, "fingerprint": fingerprint})
    setup.stamp(environment).write_text(text, encoding="utf-8")


def test_complete_environment_needs_no_installation(environment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup.set_up(environment, "dev")
    assert capsys.readouterr().out == ""


def test_larger_profile_includes_the_smaller_ones(environment: Path) -> None:
    assert setup.satisfied(environment, "run")


def test_environment_with_other_pins_is_updated(environment: Path) -> None:
    write_stamp(environment, "dev", "another")
    assert not setup.satisfied(environment, "dev")


def test_truncated_stamp_is_ignored(environment: Path) -> None:
    setup.stamp(environment).write_text('{"profile": "dev", "finger', encoding="utf-8")
    assert not setup.satisfied(environment, "dev")


def test_environment_without_its_python_is_rebuilt(environment: Path) -> None:
    setup.interpreter(environment).unlink()
    assert not setup.satisfied(environment, "dev")
    assert not setup.usable(environment)


def test_fingerprint_changes_with_the_pins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = setup.fingerprint()
    changed = tmp_path / "constraints.txt"
    changed.write_text(pins.CONSTRAINTS.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    monkeypatch.setattr(setup, "CONSTRAINTS", changed)
    assert setup.fingerprint() != before


def test_environment_without_pip_is_rebuilt(bare: Path) -> None:
    assert not setup.usable(bare)


def test_failing_step_prints_its_output(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    with pytest.raises(setup.SetupError, match=r"out\nerr\n\nsetup: do this"):
        setup.step("something", lambda: setup.quiet([sys.executable, "-c", program], "do this"))
    assert capfd.readouterr().out == "setup: something ... failed\n"


def test_successful_step_prints_only_its_duration(capfd: pytest.CaptureFixture[str]) -> None:
    setup.step("something", lambda: setup.quiet([sys.executable, "-c", "print('noise')"], ""))
    said = capfd.readouterr().out
    assert said.startswith("setup: something ... ")
    assert said.endswith(" s\n")


def test_pip_enforces_the_hashes(tmp_path: Path) -> None:
    """The command line of pip in setup, with a hash that no file has."""
    wheel = tmp_path / "sample-1.0-py3-none-any.whl"
    wheel.write_bytes(b"not looked into")
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"sample==1.0 --hash=sha256:{'0' * 64}\n", encoding="utf-8")
    command = [sys.executable, "-I", "-m", "pip", "install", "--no-index", "--find-links", str(tmp_path)]
    command += ["--require-hashes", "--only-binary", ":all:", "--target", str(tmp_path / "target")]
    command += ["-c", str(constraints), "sample>=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


def test_pinning_tools_are_not_pinned_by_themselves() -> None:
    wanted = {pins.named(requirement) for requirement in pins.declared(*setup.INSTALLERS, setup.LOCKING)}
    assert {"pip", "uv"} <= wanted
    wanted.remove("pip")  # a plugin needs it, too, and it is pinned since there are pins
    assert wanted.isdisjoint(pins.named(requirement) for requirement in pins.declared("core", "llamacpp"))
