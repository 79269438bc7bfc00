"""The embedded server by itself: on a loopback port, with a key and samples.

For tests of its clients. The tests of the server itself start it with the settings that they need.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
import psutil

from engine_plugin.engines.openvino.options import OpenVinoOptions, entry_of
from engine_plugin.models.info import bundled_samples
from engine_plugin.process import python
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection
    from pathlib import Path

__all__ = ["embedded_server"]


@asynccontextmanager
async def embedded_server(place: Path, models: Collection[str], key: str) -> AsyncIterator[str]:
    """The address (`http://127.0.0.1:PORT`) of a server that has these samples in memory; it ends with the block.

    `place` is a folder for its files, made when it is not there.
    """
    settings = {
        "host": "127.0.0.1",
        "key": key,
        "config": str(_configuration(place, models)),
        "threads": 1,
        "load_timeout": LIMIT,
        "start_timeout": LIMIT,
        "hung_timeout": LIMIT,
        "drain_timeout": 1.0,
        "restart_backoff": 0.02,
    }
    process = await asyncio.create_subprocess_exec(
        *python.module_command("openvino_server", "serve"),
        env=python.module_environ(os.environ),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        line = await asyncio.wait_for(process.stdout.readline(), LIMIT)
        address = str(json.loads(line)["address"])
        await asyncio.wait_for(_loaded(address, key, set(models)), LIMIT)
        yield address
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), LIMIT)
        except TimeoutError:
            state = psutil.Process(process.pid).status() if psutil.pid_exists(process.pid) else "gone"
            process.kill()
            raise AssertionError(f"the server did not exit when its stdin ended; it was {state}") from None


async def _loaded(address: str, key: str, models: set[str]) -> None:
    """Return when the server lists the models: it listens before it has them."""
    async with aiohttp.ClientSession(address, headers={"Authorization": f"Bearer {key}"}) as session:
        while True:
            async with session.get("/v3/models") as response:
                listed = {entry["id"] for entry in (await response.json())["data"]}
            if models <= listed:
                return
            await asyncio.sleep(0.05)


def _configuration(place: Path, models: Collection[str]) -> Path:
    samples, options = bundled_samples("openvino"), OpenVinoOptions()
    entries = []
    for name in models:
        sample = samples.get(name)
        assert sample is not None
        entries.append(entry_of(sample, "CPU", options))
    place.mkdir(parents=True, exist_ok=True)
    config = place / "config.json"
    config.write_text(json.dumps({"models": entries}), encoding="utf-8")
    return config
