"""The fake plugin, ready to be launched."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from engine_plugin.host import LogLine, PluginClient, client, launch
from tests.patience import LIMIT, pace

REPOSITORY = Path(__file__).parents[2]
FAKE_PLUGIN = Path(__file__).with_name("fake_plugin.py")

Launch: TypeAlias = Callable[..., Awaitable[PluginClient]]


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the limit for a plugin's end to what this machine needs."""
    monkeypatch.setattr(client, "SHUTDOWN_TIMEOUT", pace(1.0))
    monkeypatch.setattr(client, "EXIT_TIMEOUT", pace(1.0))


@pytest.fixture
def sockets() -> Iterator[Path]:
    """Yield a private directory whose path is short enough for unix sockets."""
    directory = Path(tempfile.mkdtemp(prefix="ep-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def fake_environment(sockets: Path) -> dict[str, str]:
    """Return the environment in which the fake plugin runs in any directory."""
    environment = {"PYTHONPATH": str(REPOSITORY)}
    if sys.platform != "win32":
        environment["FAKE_SOCKETS"] = str(sockets)
    return environment


@pytest.fixture
def launch_fake(fake_environment: dict[str, str]) -> Launch:
    """Launch the fake plugin in a mode of its own."""

    async def start(
        mode: str = "normal",
        *,
        start_timeout: float = LIMIT,
        on_log: Callable[[LogLine], None] | None = None,
        env: dict[str, str] | None = None,
        auto_mtls: bool = False,
    ) -> PluginClient:
        return await launch(
            [sys.executable, str(FAKE_PLUGIN)],
            name="fake",
            env=fake_environment | {"FAKE_MODE": mode} | (env or {}),
            start_timeout=start_timeout,
            on_log=on_log,
            auto_mtls=auto_mtls,
        )

    return start
