"""The shipped plugin for Ollama in this process, with what a test changes in its plugin.yaml."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from engine_plugin.engines.ollama.engine import OllamaEngine
from engine_plugin.manifest import load_manifest
from engine_plugin.plugin import Plugin

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["HELLO", "answer", "plugin_in"]

SHIPPED = Path(__file__).parents[3] / "plugins" / "ollama" / "plugin.yaml"
HELLO = [{"role": "user", "content": "Hello there"}]


@asynccontextmanager
async def plugin_in(
    place: Path, *, native: bool = False, engine_host: str = "", **options: Any
) -> AsyncIterator[Plugin]:
    """The plugin, its data below `place`; `native` for Ollama's own JSON, `options` for the `engine:` section."""
    shape = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    shape["provider"]["engine_host"] = engine_host
    shape["engine"] |= options
    shape["resources"]["data_dir"] = str(place / "data")
    for service in shape["services"] if native else ():
        service["config_ref"] = f"ollama:{service['service_name']}"
    (place / "plugin.yaml").write_text(yaml.safe_dump(shape, sort_keys=False), encoding="utf-8")
    manifest = load_manifest(place / "plugin.yaml")
    plugin = Plugin(manifest, OllamaEngine(manifest))
    try:
        yield plugin
    finally:
        await plugin.aclose()


async def answer(plugin: Plugin, service: str, **request: Any) -> dict[str, Any]:
    """What a service answers."""
    shape: dict[str, Any] = json.loads(await plugin.invoke(service, json.dumps(request).encode()))
    return shape
