"""The real engine, whose server is the stand-in for ovms."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest_asyncio

from engine_plugin.engines.openvino.engine import OpenVinoEngine
from engine_plugin.manifest import load_manifest
from tests.engines.openvino.fake_ovms.archives import Mirror, install
from tests.leftovers import marked, nothing_is_left, scratch
from tests.models.server import file_server
from tests.patience import LIMIT
from tests.shipped import shipped, write_manifest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Make = Callable[..., Awaitable[OpenVinoEngine]]

__all__ = ["marked", "nothing_is_left", "scratch"]


@pytest_asyncio.fixture
async def make(scratch: Path) -> AsyncIterator[Make]:
    """Make an engine of one test's own, and start it: `engine = await make(parallel=1)`."""
    executable = install(scratch / "theirs")
    async with AsyncExitStack() as stack:

        async def made(*, start: bool = True, **options: Any) -> OpenVinoEngine:
            shape = shipped("openvino")
            given = {"backend": "ovms", "ovms": str(executable), "threads": 1}
            shape["engine"] = {"name": "openvino", **given, **options}
            shape["resources"]["data_dir"] = str(scratch / "data")
            write_manifest(scratch, shape)
            engine = OpenVinoEngine(load_manifest(scratch / "plugin.yaml"))
            stack.push_async_callback(engine.aclose)
            if start:
                async with asyncio.timeout(LIMIT):
                    await engine.start("auto")
            return engine

        yield made


@pytest_asyncio.fixture
async def mirror(scratch: Path) -> AsyncIterator[Mirror]:
    async with file_server(b"") as server:
        yield Mirror(server, scratch)
