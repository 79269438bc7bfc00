"""Time from the host's Shutdown to the end of the last process, with a running request."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.patience import LIMIT, pace
from tests.test_orphans import HELLO, Workspace
from tests.test_orphans import workspace as workspace  # noqa: PLC0414  # a fixture

if TYPE_CHECKING:
    from engine_plugin.host import PluginClient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere offspring is not seen as a whole"),
]

PATIENCE = 2.0
"""Seconds at rest that a go-plugin host gives its plugin before it kills it."""
ATTEMPTS = 3
"""Other programs may have the processors; what can be done once can be done."""

OBEYS: dict[str, Any] = {"grandchild": "own", "tokens": -1}


async def seconds_to_end(workspace: Workspace, *, stop_timeout: float) -> float:
    """Start a plugin and an endless stream, end it as a host does, and check that no process is left."""
    workspace.configure(stop_timeout=stop_timeout)
    async with await workspace.launch() as plugin:
        await plugin.start_engine()
        async with asyncio.timeout(LIMIT), plugin.stream("chat", HELLO) as chunks:
            await anext(chunks)
            assert len(workspace.family()) >= 3, "plugin, engine and its child"
            return await end(workspace, plugin)


async def end(workspace: Workspace, plugin: PluginClient) -> float:
    began = time.monotonic()
    await plugin.kill()
    await workspace.gone()
    taken = time.monotonic() - began
    return taken if plugin.returncode == 0 else math.inf  # the host had to kill it


@pytest.mark.promise("P1", "G20", "G34")
@pytest.mark.parametrize(
    ("behaviour", "bound"), [(OBEYS, 1.0), (OBEYS | {"ignore_term": True}, PATIENCE)], ids=["obeys", "does not obey"]
)
async def test_plugin_and_engine_end_within_the_limit_of_the_host(
    workspace: Workspace, behaviour: dict[str, Any], bound: float
) -> None:
    """Also where stop_timeout is half a minute."""
    workspace.fake.behave(behaviour)
    taken = []
    for _ in range(ATTEMPTS):
        taken.append(await seconds_to_end(workspace, stop_timeout=30))
        if taken[-1] < pace(bound):
            return
    pytest.fail(f"it took {taken} s each time, at most {bound} s are promised")
