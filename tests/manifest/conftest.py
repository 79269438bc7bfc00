"""A small valid manifest for the tests to break."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine_plugin.manifest import platform_key

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GOOD = """\
version: "1.0"
provider:
  name: sample-plugin
  version: 1.0.0
  type: local
services:
  - service_name: chat
    config_ref: openai:chat
engine:
  name: llamacpp
"""

HERE = platform_key()
WITH_PROGRAM = f"{GOOD}platforms:\n  {HERE}:\n    executable: bin/here/plugin\n"


def changed(old: str, new: str) -> str:
    """Return GOOD with one piece replaced."""
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment with a home and a data directory that do not exist."""
    home = str(tmp_path / "home")
    return {"HOME": home, "USERPROFILE": home, "AOG_DATA_DIR": str(tmp_path / "aog")}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a plugin.yaml into sample-plugin/ and returns its path."""

    def write_file(text: str | bytes = GOOD, name: str = "plugin.yaml") -> Path:
        path = tmp_path / "sample-plugin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_file


@pytest.fixture
def make_executable() -> Callable[[Path], Path]:
    """Puts a file that may be executed at a path."""

    def make(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o700)
        return path

    return make
