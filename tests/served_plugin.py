"""A plugin with a small engine, served to a client over a real socket."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from engine_plugin.host import PluginClient, connect
from engine_plugin.manifest import load_manifest
from engine_plugin.plugin import Plugin
from engine_plugin.server import new_server
from engine_plugin.server.servicer import provider_service
from tests.patience import LIMIT
from tests.shipped import shipped, write_manifest

from .host.conftest import sockets as sockets  # noqa: PLC0414  # a fixture
from .small_engine import SmallEngine

if TYPE_CHECKING:
    from pathlib import Path

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
HANG = HELLO | {"hang": True}

Serve: TypeAlias = Callable[..., Awaitable[tuple[PluginClient, SmallEngine]]]


@pytest.fixture
async def serve(tmp_path: Path, sockets: Path) -> AsyncIterator[Serve]:
    """A served plugin whose services have this timeout."""
    async with AsyncExitStack() as stack:

        async def start(timeout: int = 0) -> tuple[PluginClient, SmallEngine]:
            shape = shipped("llamacpp")
            services = [service for service in shape["services"] if service["service_name"] != "generate"]
            speech = services[0] | {"service_name": "speech-to-text-ws", "expose_protocol": "WEBSOCKET"}
            speech["config_ref"] = ""
            speech["capabilities"] = {"support_streaming": True, "support_bidirectional": True}
            image = {key: value for key, value in speech.items() if key != "capabilities"}
            image |= {"service_name": "text-to-image", "expose_protocol": "HTTP"}
            for service in (*services, speech, image):
                service.pop("default_model", None)
                service["timeout"] = timeout
            shape["services"] = [*services, speech, image]
            shape["resources"]["data_dir"] = str(tmp_path / "data")
            write_manifest(tmp_path, shape)
            manifest = load_manifest(tmp_path / "plugin.yaml")
            engine = SmallEngine(manifest)
            server = new_server()
            server.add(provider_service(Plugin(manifest, engine)))
            unix = sys.platform != "win32"
            address = await server.start(f"unix:{sockets / 's'}" if unix else "127.0.0.1:0")
            stack.push_async_callback(server.stop, 0)
            return await stack.enter_async_context(await connect(address)), engine

        yield start


async def still_well(client: PluginClient) -> None:
    """Check that the plugin still answers."""
    assert await client.invoke("chat", HELLO) == {"service": "chat", "model": "small"}


async def gone(engine: SmallEngine) -> None:
    """Wait until the engine's work was cancelled and its `finally` ran."""
    async with asyncio.timeout(LIMIT):
        await engine.ended.wait()
    engine.ended.clear()
