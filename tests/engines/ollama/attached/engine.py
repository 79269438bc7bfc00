"""The shipped Ollama plugin in this process, with changes to its plugin.yaml."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama.engine import OllamaEngine
from engine_plugin.manifest import load_manifest
from engine_plugin.plugin import Plugin
from tests.shipped import shipped, write_manifest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

__all__ = ["HELLO", "answer", "plugin_in"]

HELLO = [{"role": "user", "content": "Hello there"}]


@asynccontextmanager
async def plugin_in(
    place: Path, *, native: bool = False, engine_host: str = "", **options: Any
) -> AsyncIterator[Plugin]:
    """The plugin with its data below `place`;

    `native` selects Ollama's own JSON, `options` go to the `engine:` section.
    """
    shape = shipped("ollama")
    shape["provider"]["engine_host"] = engine_host
    shape["engine"] |= options
    shape["resources"]["data_dir"] = str(place / "data")
    for service in shape["services"] if native else ():
        service["config_ref"] = f"ollama:{service['service_name']}"
    write_manifest(place, shape)
    manifest = load_manifest(place / "plugin.yaml")
    plugin = Plugin(manifest, OllamaEngine(manifest))
    try:
        yield plugin
    finally:
        await plugin.aclose()


async def answer(plugin: Plugin, service: str, **request: Any) -> dict[str, Any]:
    """The answer of a service."""
    shape: dict[str, Any] = json.loads(await plugin.invoke(service, json.dumps(request).encode()))
    return shape
