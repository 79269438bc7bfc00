"""Plugins with the real engine, reached over a real socket."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import pytest_asyncio

from engine_plugin.engines.llamacpp.engine import LlamaCppEngine
from engine_plugin.host import PluginClient, connect
from engine_plugin.manifest import load_manifest
from engine_plugin.models.defaults import DefaultModels
from engine_plugin.models.store import PullRequest
from engine_plugin.plugin import Plugin
from engine_plugin.server import new_server
from engine_plugin.server.servicer import provider_service
from tests.leftovers import marked, nothing_is_left, scratch
from tests.shipped import shipped, write_manifest

from .running import ENDLESS, ENGINE_MARK, REPOSITORY, RunningPlugin

__all__ = ["marked", "nothing_is_left", "scratch"]

Serve: TypeAlias = Callable[..., Awaitable[RunningPlugin]]


@pytest.fixture(scope="session")
def pulled(tmp_path_factory: pytest.TempPathFactory, marked: None) -> Path:
    """A models directory with the endless chat model, pulled once for all tests."""
    root = tmp_path_factory.mktemp("pulled")
    (root / "plugin.yaml").write_text((REPOSITORY / "plugins/llamacpp/plugin.yaml").read_text())
    manifest = load_manifest(root / "plugin.yaml", {"AOG_DATA_DIR": str(root)})

    async def pull() -> None:
        engine = LlamaCppEngine(manifest)
        try:
            async for _ in engine.pull_model(PullRequest(model=str(ENDLESS))):
                pass
        finally:
            await engine.aclose()

    asyncio.run(pull())
    return manifest.data_dir / "models"


class _Server:
    """Starts plugins in this process and stops them at the end."""

    def __init__(self, root: Path, models: Path) -> None:
        self._root = root
        self._models = models
        self._stack = AsyncExitStack()
        self._count = 0

    async def __call__(
        self,
        *,
        start: bool = True,
        data: Path | None = None,
        change: Callable[[dict[str, Any]], None] = lambda _shape: None,
        environ: dict[str, str] | None = None,
        **options: Any,
    ) -> RunningPlugin:
        """`options` go to the manifest's `engine:` section; `change` may edit the whole of it."""
        self._count += 1
        place = self._root / str(self._count)
        place.mkdir()
        shape = shipped("llamacpp")
        # No other llama.cpp of this machine, and not all of its processors.
        shape["engine"] |= {"backend": "xllamacpp", "threads": 1} | options
        shape["resources"]["data_dir"] = str(data or place / "data")
        change(shape)
        write_manifest(place, shape)
        mark = secrets.token_hex(8)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**(environ or {}), ENGINE_MARK: mark}.items():
                patch.setenv(name, value)
            manifest = load_manifest(place / "plugin.yaml")
            engine = LlamaCppEngine(manifest)
        if not manifest.data_dir.exists():
            shutil.copytree(self._models, manifest.data_dir / "models")
            DefaultModels(manifest.data_dir, "llamacpp").write({"chat": "tiny-chat", "generate": "tiny-chat"})
        plugin = Plugin(manifest, engine)
        self._stack.push_async_callback(plugin.aclose)
        server = new_server()
        server.add(provider_service(plugin))
        unix = sys.platform != "win32"
        address = await server.start(f"unix:{place / 's'}" if unix else "127.0.0.1:0")
        self._stack.push_async_callback(server.stop, 0)
        client: PluginClient = await self._stack.enter_async_context(await connect(address))
        if start:
            await client.start_engine()
        return RunningPlugin(plugin, engine, client, address, mark)

    async def aclose(self) -> None:
        await self._stack.aclose()


@pytest_asyncio.fixture
async def serve(scratch: Path, pulled: Path) -> AsyncIterator[Serve]:
    """Start a plugin for one test: `running = await serve(parallel=1)`."""
    server = _Server(scratch, pulled)
    yield server
    await server.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(nothing_is_left: None, pulled: Path) -> AsyncIterator[RunningPlugin]:
    """A started plugin, shared by the tests of a module that do not change it."""
    root = Path(tempfile.mkdtemp(prefix="epl-"))
    server = _Server(root, pulled)
    try:
        yield await server()
    finally:
        await server.aclose()
        shutil.rmtree(root)
