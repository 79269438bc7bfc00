"""A shipped plugin, spawned as a host does it, and what its engine can do in these tests."""

from __future__ import annotations

import json
import os
import secrets
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.host import PluginClient, events, launch
from engine_plugin.models.info import KIND_OF_SERVICE
from tests.patience import LIMIT
from tests.shipped import shipped, write_manifest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

__all__ = ["ROOT", "World", "spawned"]

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class World:
    """A started plugin. `models` has a model for each kind that the engine supports."""

    engine: str
    plugin: PluginClient
    models: Mapping[str, str]
    place: Path

    def model(self, service: str) -> str:
        """Return the model for a service."""
        return self.models[KIND_OF_SERVICE[service]]

    def can(self, service: str) -> bool:
        """Whether this engine has the service."""
        return KIND_OF_SERVICE[service] in self.models

    def request(self, service: str, **fields: Any) -> dict[str, Any]:
        """Return a request of a service to its model."""
        return {"model": self.model(service), **fields}

    def chat(self, text: str = "Hello", **fields: Any) -> dict[str, Any]:
        """Return a chat request of one message."""
        message = {"role": "user", "content": text}
        return self.request("chat", messages=[message], **({"max_tokens": 16, "temperature": 0} | fields))

    async def streamed(self, service: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Return all events of a stream that must end properly."""
        async with self.plugin.stream(service, request) as chunks:
            return [event async for event in events(chunks)]

    async def raw(self, service: str, request: dict[str, Any]) -> bytes:
        """Return a stream's bytes in the blocks that arrive."""
        async with self.plugin.stream(service, request) as chunks:
            return b"".join([chunk async for chunk in chunks])


@asynccontextmanager
async def spawned(
    engine: str, place: Path, models: Mapping[str, str], environ: Mapping[str, str], **changes: Any
) -> AsyncIterator[World]:
    """Launch the plugin of `engine` with its shipped plugin.yaml; `changes` replace `engine_host` and options."""
    manifest = shipped(engine)
    manifest["provider"]["engine_host"] = changes.pop("engine_host", "")
    manifest["engine"] |= changes
    folder = place / manifest["provider"]["name"]
    folder.mkdir()
    write_manifest(folder, manifest)
    environment = {"AOG_DATA_DIR": str(place / "data"), **environ}
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    client = await launch(
        [sys.executable, "-m", "engine_plugin.app"],
        name=f"{engine}-{secrets.token_hex(2)}",
        cwd=folder,
        env=environment | {"PYTHONPATH": python_path},
        start_timeout=LIMIT,
    )
    async with client:
        await client.start_engine()
        yield World(engine, client, models, place)


def text_of(answer: Mapping[str, Any]) -> str:
    """Return the text of a chat.completion."""
    content = answer["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise TypeError(json.dumps(answer))
    return content
