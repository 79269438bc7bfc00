"""An engine whose sockets are removed is restarted, at once when StartEngine is called."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import EnginePluginError
from engine_plugin.process.engine_process import ProcessState
from engine_plugin.system.addresses import SOCKET_PATH_LIMIT
from engine_plugin.system.socketdir import keep_fresh, private_directory
from tests.engines.llamacpp.running import eventually
from tests.fake_engine.program import TOKENS
from tests.patience import LIMIT

from .world import words

if TYPE_CHECKING:
    from .world import Begin


@pytest.mark.promise("L2")
async def test_engine_with_a_removed_socket_is_restarted(begin: Begin) -> None:
    """It needs no request; the engine's health names the cause."""
    world = await begin({}, health_interval=0.05)
    await world.client.load_model("tiny-chat")
    assert world.engine.sockets is not None
    for path in world.engine.sockets.iterdir():
        path.unlink()
    await world.fake.event("loaded", life=2)
    await eventually(lambda: world.state() is ProcessState.READY)
    assert await world.chat() == words(TOKENS)


@pytest.mark.promise("L2")
async def test_start_engine_restarts_an_engine_with_a_removed_socket_directory(begin: Begin) -> None:
    world = await begin({}, health_interval=3600)
    await world.client.load_model("tiny-chat")
    sockets = world.engine.sockets
    assert sockets is not None
    shutil.rmtree(sockets)
    async with asyncio.timeout(LIMIT):
        await world.client.start_engine()
    assert world.life == 2
    assert await world.chat() == words(TOKENS)
    descriptor = os.open(sockets, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(descriptor)
    await world.client.start_engine()
    assert world.life == 2, "an engine that can be reached is left alone"


@pytest.mark.promise("L2")
async def test_socket_directory_is_locked_and_its_time_renewed() -> None:
    """systemd-tmpfiles skips a locked directory; other cleaners check the time."""
    with private_directory("", "") as directory:
        (directory / "sock").touch()
        descriptor = os.open(directory, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        paths = [directory, directory / "sock"]
        for path in paths:
            os.utime(path, (1, 1))
        keeping = asyncio.create_task(keep_fresh(directory, 0.01))
        await eventually(lambda: all(path.stat().st_mtime > 1 for path in paths))
        keeping.cancel()


@pytest.mark.promise("L7")
async def test_temporary_directory_too_long_for_a_socket_is_reported(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte decides, and an engine's sockets need more than the plugin's own."""
    world = await begin({})
    await world.client.stop_engine()
    below = len("/engine-plugin-12345678/12345678.sock")
    with tempfile.TemporaryDirectory(prefix="epl-") as base:
        for excess in (0, 1):
            place = Path(base) / ("x" * (SOCKET_PATH_LIMIT - below - len(base) - 1 + excess))
            place.mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(place))
            if not excess:
                await world.client.start_engine()
                assert await world.chat() == words(TOKENS)
                await world.client.stop_engine()
                continue
            with pytest.raises(EnginePluginError, match="Set TMPDIR to a shorter directory"):
                await world.client.start_engine()
