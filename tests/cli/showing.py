"""An engine whose address depends on files in its data directory."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.catalogue import ENGINE_NOT_RUNNING
from engine_plugin.engines.base import Health, HealthState
from engine_plugin.errors import UnavailableError
from engine_plugin.models.info import Loaded, ModelCapabilities
from engine_plugin.protocol.shapes import EngineConfig

from .fake_engine import FakeEngine

if TYPE_CHECKING:
    from engine_plugin.models.info import ModelInfo

    from .conftest import Workplace


CAPABILITIES = {
    "embedder": ModelCapabilities(("embedding",), 512, "file"),
    "guessed": ModelCapabilities(("completion",), 8192, "estimate"),
    "tagged:latest": ModelCapabilities(("completion", "tools"), 40960, "engine"),
}


class ShownEngine(FakeEngine):
    """A managed engine; with the file `address` an attached server, which is down if the file `down` exists.

    With the file `slow` it never lists its models; `guessed` and `embedder` are in memory as soon as they are here.
    """

    def config(self) -> EngineConfig:
        file = self._data / "address"
        if not file.exists():
            return {**super().config(), "host": "127.0.0.1:1", "exec_file": "fake"}
        return EngineConfig(host=file.read_text(), scheme="https")

    async def health(self) -> Health:
        if (self._data / "down").exists():
            return Health(HealthState.DEAD, "no server answers. Start it: fake serve")
        if self._started or (self._data / "address").exists():
            return Health(HealthState.READY, "as the test wants it")
        return Health.dead(ENGINE_NOT_RUNNING.error())

    async def list_models(self) -> list[ModelInfo]:
        if (self._data / "slow").exists():
            await asyncio.Event().wait()
        if (self._data / "down").exists():
            raise UnavailableError("no server answers")
        return [
            replace(info, capabilities=CAPABILITIES.get(info.name, ModelCapabilities()))
            for info in await super().list_models()
        ]

    async def running_models(self) -> list[ModelInfo]:
        leaves = datetime.now(UTC) + timedelta(minutes=5, seconds=10)
        loaded = {
            "guessed": Loaded(2_000_000_000, 1_500_000_000, expires_at=leaves),
            "embedder": Loaded(500_000, idle=12.3),
        }
        here = {info.name: info for info in await self.list_models()}
        return [replace(here[name], loaded=what) for name, what in loaded.items() if name in here]


def use_engine(place: Workplace, engine: str) -> None:
    """Give the plugin of a workplace another engine: `module:class` in tests/cli."""
    site = Path(place.env["PYTHONPATH"].split(os.pathsep)[0])
    for points in site.glob("*/entry_points.txt"):
        points.write_text(f"[engine_plugin.engines]\nfake = tests.cli.{engine}\n")
