"""Fixtures for Ollama's software and managed servers below one directory, which leave nothing behind."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest_asyncio

from tests.engines.ollama.contract.release import Mirror
from tests.leftovers import marked, nothing_is_left, scratch
from tests.models.server import file_server, without_proxies

from .place import Place

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest

__all__ = ["marked", "mirror", "nothing_is_left", "place", "scratch"]

collect_ignore = ["test_installing.py", "test_managed.py"] if sys.platform == "win32" else []
"""The contract server as a program is a script with a #! line."""


@pytest_asyncio.fixture
async def mirror(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mirror]:
    """A mirror for Ollama's releases on loopback, without any yet."""
    without_proxies(monkeypatch)
    async with file_server(b"") as server:
        yield Mirror(server, scratch)


@pytest_asyncio.fixture
async def place(scratch: Path, marked: None) -> AsyncIterator[Place]:
    """A data directory. At the end its servers are stopped, and no process may be left."""
    place = Place(scratch, dict(os.environ))
    try:
        yield place
    finally:
        await place.close()
    assert list((place.data / "run").glob("*")) == []
