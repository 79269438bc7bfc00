"""A plugin in this process, attached to a contract server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from engine_plugin.engines.openai import discovery
from engine_plugin.engines.openai.discovery import PROBE_TIMEOUT
from engine_plugin.engines.openai.engine import OpenAIEngine
from engine_plugin.manifest import load_manifest
from engine_plugin.manifest.model import SERVICE_NAMES
from engine_plugin.plugin import Plugin
from tests.engines.openai.contract import Contract, free_pair
from tests.shipped import write_manifest

if TYPE_CHECKING:
    from pathlib import Path


Serve: TypeAlias = Callable[..., Awaitable[Contract]]
Attach: TypeAlias = Callable[..., Plugin]

__all__ = ["Attach", "Serve", "manifest_of"]


def manifest_of(folder: Path, engine_host: str = "", **options: Any) -> Any:
    """A manifest with all services and `options` in its `engine:` section."""
    services = [
        {
            "service_name": name,
            "config_ref": f"openai:{name}",
            "capabilities": {
                "support_streaming": name in ("chat", "generate", "text-to-image"),
                "support_bidirectional": name.endswith("-ws"),
            },
        }
        for name in SERVICE_NAMES
    ]
    folder.mkdir(parents=True, exist_ok=True)
    shape = {
        "version": "1.0",
        "provider": {"name": folder.name, "version": "1.0.0", "type": "local", "engine_host": engine_host},
        "services": services,
        "resources": {"data_dir": str(folder / "data")},
        "engine": {"name": "openai", "connect_backoff": 0.02, **options},
    }
    write_manifest(folder, shape)
    return load_manifest(folder / "plugin.yaml")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove keys from the environment, and ignore the well-known ports."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv(PROBE_TIMEOUT, raising=False)
    monkeypatch.setattr(discovery, "WELL_KNOWN_PORTS", {})


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start a contract server: `await serve("vllm")`."""
    async with AsyncExitStack() as stack:

        async def start(kind: str, *, key: str = "", prefix: str = "", port: int = 0, tls: Any = None) -> Contract:
            server = Contract(kind, key)
            server.prefix = prefix
            stack.push_async_callback(server.stop)
            await server.start(port or (free_pair() if kind == "ovo" else 0), tls)
            return server

        yield start


@pytest.fixture
async def attach(tmp_path: Path) -> AsyncIterator[Attach]:
    """Create a plugin for a server at an address, or for a contract server."""
    async with AsyncExitStack() as stack:

        def make(at: Contract | str, /, **options: Any) -> Plugin:
            if isinstance(at, Contract):
                options.setdefault("server", at.kind if at.kind in ("ovo", "lmstudio") else "auto")
                at = at.url
            engine = OpenAIEngine(manifest_of(tmp_path / "p", at, **options))
            plugin = Plugin(engine.manifest, engine)
            stack.push_async_callback(plugin.aclose)
            return plugin

        yield make
