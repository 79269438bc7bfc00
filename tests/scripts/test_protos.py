"""The committed stubs are those of protos/, and the check reports others."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

import protos

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the Python stubs to modify."""
    return shutil.copytree(protos.PYTHON.committed, tmp_path / "stubs", ignore=shutil.ignore_patterns("__pycache__"))


def test_committed_stubs_are_up_to_date() -> None:
    assert protos.stale(protos.PYTHON) == []


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed: its stubs were not compared")
def test_committed_go_stubs_are_up_to_date() -> None:
    assert protos.stale(protos.GO) == []


def test_changed_missing_and_leftover_stubs_are_reported(copy: Path) -> None:
    with (copy / "provider_pb2.py").open("a", encoding="utf-8") as stub:
        stub.write("# changed\n")
    (copy / "provider_pb2.pyi").unlink()
    (copy / "old_pb2.py").touch()
    assert protos.stale(protos.PYTHON, copy) == ["old_pb2.py", "provider_pb2.py", "provider_pb2.pyi"]
