"""Fixtures for the tests of this directory."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest_asyncio

from tests.leftovers import marked, nothing_is_left, scratch

from .world import Begin

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["marked", "nothing_is_left", "scratch"]

if sys.platform == "win32":
    # The fake engine is a script with a #! line, and half of its misdeeds are signals.
    collect_ignore_glob = ["test_*.py"]


@pytest_asyncio.fixture
async def begin() -> AsyncIterator[Begin]:
    """Start a plugin with a fake engine: `world = await begin({"load_seconds": 1}, start_timeout=2)`."""
    begin = Begin(Path(tempfile.mkdtemp(prefix="epf-")))
    yield begin
    await begin.end()
