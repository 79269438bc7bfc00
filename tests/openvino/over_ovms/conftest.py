"""The real engine, whose server is the stand-in for ovms."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest_asyncio
import yaml

from engine_plugin.engines.openvino.engine import OpenVinoEngine
from engine_plugin.manifest import load_manifest
from tests.leftovers import marked, nothing_is_left, scratch
from tests.llamacpp.running import REPOSITORY
from tests.models.server import file_server
from tests.openvino.fake_ovms.archives import Mirror, install

from .calls import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Make = Callable[..., Awaitable[OpenVinoEngine]]

__all__ = ["marked", "nothing_is_left", "scratch"]


@asynccontextmanager
async def making(folder: Path) -> AsyncIterator[Make]:
    """Makes engines on one data directory, and starts them: `engine = await make(parallel=1)`."""
    executable = install(folder / "theirs")
    async with AsyncExitStack() as stack:

        async def make(*, start: bool = True, **options: Any) -> OpenVinoEngine:
            shape = yaml.safe_load((REPOSITORY / "plugin.yaml").read_text())
            given = {"backend": "ovms", "ovms": str(executable), "threads": 1}
            shape["engine"] = {"name": "openvino", **given, **options}
            shape["resources"]["data_dir"] = str(folder / "data")
            (folder / "plugin.yaml").write_text(yaml.safe_dump(shape, sort_keys=False))
            made = OpenVinoEngine(load_manifest(folder / "plugin.yaml"))
            stack.push_async_callback(made.aclose)
            if start:
                async with asyncio.timeout(LIMIT):
                    await made.start("auto")
            return made

        yield make


@pytest_asyncio.fixture
async def make(scratch: Path) -> AsyncIterator[Make]:
    """Make engines of one test's own."""
    async with making(scratch) as make:
        yield make


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(nothing_is_left: None) -> AsyncIterator[OpenVinoEngine]:
    """A started engine for all tests of a module that leave it as it is."""
    folder = Path(tempfile.mkdtemp(prefix="epl-"))
    try:
        async with making(folder) as make:
            yield await make()
    finally:
        shutil.rmtree(folder)


@pytest_asyncio.fixture
async def mirror(scratch: Path) -> AsyncIterator[Mirror]:
    async with file_server(b"") as server:
        yield Mirror(server, scratch)
