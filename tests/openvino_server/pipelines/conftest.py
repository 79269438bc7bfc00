"""Workers that several tests share."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from .running import SAMPLES, RunningWorker, worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llm() -> AsyncIterator[RunningWorker]:
    """The chat model, with a KV cache of a fixed size."""
    async with worker("chat", SAMPLES / "tiny-chat", cache_size=1) as running:
        yield running


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Creates a copy of a sample model with some of its files, by name, replaced by other text."""

    def make(sample: str, **files: str) -> Path:
        folder = tmp_path / sample
        shutil.copytree(SAMPLES / sample, folder)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)
        return folder

    return make
