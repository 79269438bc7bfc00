"""What every test of this directory uses."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import pytest_asyncio

from tests.llamacpp.running import MARK, processes_of

from .world import Begin

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

if sys.platform == "win32":
    # The fake engine is a script with a #! line, and half of its misdeeds are signals.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _mark() -> Iterator[None]:
    """Whatever this test run starts can be told from what another does at the same time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, uuid.uuid4().hex)
        yield


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left(_mark: None) -> Iterator[None]:
    """After each module no process of ours is left."""
    yield
    psutil.wait_procs(processes_of(os.environ[MARK]), timeout=3)
    left = processes_of(os.environ[MARK])
    for process in left:
        process.kill()
    assert left == [], f"left behind: {left}"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory whose path is short enough for a unix socket's."""
    path = Path(tempfile.mkdtemp(prefix="epf-"))
    yield path
    shutil.rmtree(path)


@pytest_asyncio.fixture
async def begin() -> AsyncIterator[Begin]:
    """Start a plugin with a fake engine: `world = await begin({"load_seconds": 1}, start_timeout=2)`."""
    begin = Begin(Path(tempfile.mkdtemp(prefix="epf-")))
    yield begin
    await begin.end()
