"""Scenes of hosted default plugins, which must not leave anything."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .scene import HostedScene

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def scene() -> Iterator[HostedScene]:
    if sys.platform != "linux":
        pytest.skip("elsewhere offspring is not seen as a whole")
    place = Path(tempfile.mkdtemp(prefix="eph-"))
    scene = HostedScene(place)
    try:
        yield scene
        assert scene.family() == []
    finally:
        for process in scene.family():
            process.kill()
        shutil.rmtree(place)
