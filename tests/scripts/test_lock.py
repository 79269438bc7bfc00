"""The lock files are consistent, and each inconsistency is reported."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

import lock
import pins

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def locked() -> list[pins.Pin]:
    return pins.read_pins()


@pytest.fixture(scope="module")
def engines() -> dict[str, list[pins.Pin]]:
    return {extra: pins.read_pins(path) for extra, path in lock.ENGINE_REQUIREMENTS.items()}


def test_committed_lock_files_are_consistent(locked: list[pins.Pin], engines: dict[str, list[pins.Pin]]) -> None:
    assert lock.problems(pins.declared(), locked, engines) == []


def test_requirement_without_a_pin_is_reported(locked: list[pins.Pin]) -> None:
    assert lock.problems(["no-such_package>=1"], locked, {}) == ["no-such_package>=1 is not in constraints.txt"]


def test_pin_that_violates_a_requirement_is_reported(locked: list[pins.Pin]) -> None:
    (complaint,) = lock.problems(["httpx>=999"], locked, {})
    assert complaint.startswith("httpx>=999 does not allow httpx==")


def test_engine_pin_that_differs_from_the_constraints_is_reported(
    locked: list[pins.Pin], engines: dict[str, list[pins.Pin]]
) -> None:
    own = [replace(pin, hashes=pin.hashes[1:]) if pin.name == "numpy" else pin for pin in engines["llamacpp"]]
    complaints = lock.problems([], locked, {"llamacpp": own})
    assert complaints
    assert all("numpy==" in complaint and "differs from constraints.txt" in complaint for complaint in complaints)


def test_engine_lock_without_its_package_is_reported(
    locked: list[pins.Pin], engines: dict[str, list[pins.Pin]]
) -> None:
    own = [pin for pin in engines["llamacpp"] if pin.name != "gguf"]
    assert any("lacks gguf" in complaint for complaint in lock.problems([], locked, {"llamacpp": own}))


def test_every_pin_has_a_hash_and_no_file_names_a_registry(locked: list[pins.Pin]) -> None:
    assert len({pin.name for pin in locked}) > 40
    assert all(pin.hashes for pin in locked)
    for path in (pins.CONSTRAINTS, *lock.ENGINE_REQUIREMENTS.values()):
        assert "://" not in path.read_text(encoding="utf-8")
        assert "index" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("entry", ["httpx>=1\n", "httpx==1.0\n", "httpx==1.0 \\\n    --hash=md5:00\n"])
def test_entry_without_version_or_hash_is_rejected(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text(entry, encoding="utf-8")
    with pytest.raises(ValueError, match="no version and hash"):
        pins.read_pins(path)
