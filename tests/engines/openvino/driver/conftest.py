"""The OpenVINO engine with the embedded server, behind the real servicer, reached over a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import pytest_asyncio

from engine_plugin.engines.openvino.engine import OpenVinoEngine
from engine_plugin.engines.openvino.software import SERVER_MODULE, OpenVinoSoftware
from engine_plugin.host import PluginClient, connect
from engine_plugin.manifest import load_manifest
from engine_plugin.plugin import Plugin
from engine_plugin.process import python
from engine_plugin.server import new_server
from engine_plugin.server.servicer import provider_service
from tests.leftovers import marked, nothing_is_left, scratch
from tests.shipped import write_manifest

from .running import ENGINE_MARK, SERVICES, RunningEngine

if TYPE_CHECKING:
    from engine_plugin.install.software import Backend

__all__ = ["marked", "nothing_is_left", "scratch"]

Serve: TypeAlias = Callable[..., Awaitable[RunningEngine]]

# The embedded server, also where an ovms is on PATH, on one processor; quick where nothing is to be waited for.
SWIFT: dict[str, Any] = {"name": "openvino", "backend": "embedded", "threads": 1, "restart_backoff": 0.02}


def _manifest(place: Path, options: dict[str, Any]) -> dict[str, Any]:
    services = [
        {
            "service_name": name,
            "config_ref": f"openvino:{name}",
            "timeout": 60,
            "capabilities": {
                "support_streaming": name in ("chat", "generate", "text-to-image"),
                "support_bidirectional": name.endswith("-ws"),
            },
        }
        for name in SERVICES
    ]
    return {
        "version": "1.0",
        "provider": {"name": place.name, "version": "1.0.0", "type": "local"},
        "services": services,
        "resources": {"data_dir": str(place / "data")},
        "engine": SWIFT | options,
    }


@pytest.fixture(scope="session")
def probed(marked: None) -> dict[str, Any]:
    """What the software here says of itself: asked once, since that takes longer than most tests."""
    argv, environ = python.module_command(SERVER_MODULE, "probe"), python.module_environ(os.environ)
    _, out, _ = asyncio.run(python.run_briefly(argv, environ, timeout=60))
    shape: dict[str, Any] = json.loads(out)
    return shape


@pytest.fixture(scope="module", autouse=True)
def known(probed: dict[str, Any]) -> Iterator[None]:
    """Starts do without asking the software."""

    async def probe(_self: OpenVinoSoftware, _backend: Backend) -> dict[str, Any]:
        return probed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenVinoSoftware, "probe", probe)
        yield


class _Plugins:
    """Starts plugins in this process and stops them all at the end."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._stack = AsyncExitStack()
        self._count = 0

    async def __call__(self, *, start: bool = True, **options: Any) -> RunningEngine:
        """`options` go to the manifest's `engine:` section."""
        self._count += 1
        place = self._root / f"p{self._count}"
        place.mkdir()
        write_manifest(place, _manifest(place, options))
        mark = secrets.token_hex(8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(ENGINE_MARK, mark)
            engine = OpenVinoEngine(load_manifest(place / "plugin.yaml"))
        plugin = Plugin(engine.manifest, engine)
        self._stack.push_async_callback(plugin.aclose)
        server = new_server()
        server.add(provider_service(plugin))
        address = await server.start(f"unix:{place / 's'}" if sys.platform != "win32" else "127.0.0.1:0")
        self._stack.push_async_callback(server.stop, 0)
        client: PluginClient = await self._stack.enter_async_context(await connect(address))
        if start:
            await client.start_engine()
        return RunningEngine(engine, client, mark)

    async def aclose(self) -> None:
        await self._stack.aclose()


@pytest_asyncio.fixture
async def serve(scratch: Path) -> AsyncIterator[Serve]:
    """Start a plugin of one test's own: `running = await serve(parallel=1)`."""
    plugins = _Plugins(scratch)
    yield plugins
    await plugins.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(nothing_is_left: None, known: None) -> AsyncIterator[RunningEngine]:
    """A started plugin for all tests of a module that leave it as it is."""
    root = Path(tempfile.mkdtemp(prefix="epl-"))
    plugins = _Plugins(root)
    try:
        yield await plugins()
    finally:
        await plugins.aclose()
        shutil.rmtree(root)
