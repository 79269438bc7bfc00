"""The plugin of the driver's tests, whose server is the stand-in for ovms."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest_asyncio

from tests.engines.openvino.driver.conftest import _Plugins
from tests.engines.openvino.fake_ovms.archives import install
from tests.leftovers import marked, nothing_is_left, scratch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.engines.openvino.driver.running import RunningEngine

__all__ = ["marked", "nothing_is_left", "scratch"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(nothing_is_left: None) -> AsyncIterator[RunningEngine]:
    """A started plugin for all tests of a module that leave it as it is."""
    root = Path(tempfile.mkdtemp(prefix="epl-"))
    plugins = _Plugins(root)
    try:
        yield await plugins(backend="ovms", ovms=str(install(root / "theirs")))
    finally:
        await plugins.aclose()
        shutil.rmtree(root)
