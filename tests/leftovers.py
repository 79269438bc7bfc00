"""Fixtures that check for leftovers of engines. A conftest.py uses them by importing them."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.engines.llamacpp.running import MARK, processes_of
from tests.patience import patience

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["marked", "nothing_is_left", "scratch"]


@pytest.fixture(scope="session", autouse=True)
def marked() -> Iterator[None]:
    """Whatever this test run starts can be told from what another does at the same time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, uuid.uuid4().hex)
        yield


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left(marked: None) -> Iterator[None]:
    """Check after each module that no process of the tests is left."""
    yield
    psutil.wait_procs(processes_of(os.environ[MARK]), timeout=patience(1))
    left = processes_of(os.environ[MARK])
    for process in left:
        process.kill()
    assert left == [], f"left behind: {left}"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory for data and sockets whose path is short enough for a unix socket's."""
    path = Path(tempfile.mkdtemp(prefix="epl-"))
    yield path
    shutil.rmtree(path)
