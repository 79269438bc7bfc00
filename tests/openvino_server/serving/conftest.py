"""The embedded server in this process, with a worker that follows the script of each call."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import pytest_asyncio

from openvino_server.app import make_app, serve_http
from openvino_server.model import ModelSettings
from openvino_server.registry import Registry
from tests.leftovers import marked, nothing_is_left, scratch
from tests.patience import LIMIT

__all__ = ["KEY", "WORKER", "Config", "Front", "marked", "nothing_is_left", "scratch"]

KEY = "a-key"
WORKER = (sys.executable, "-P", "-s", str(Path(__file__).with_name("worker.py")))


class Config:
    """config.json, and the folders of its models."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "config.json"
        self.models: dict[str, dict[str, Any]] = {}
        self.write()

    def add(
        self,
        name: str,
        kind: str = "chat",
        folder: Path | None = None,
        *,
        device: str = "CPU",
        options: dict[str, Any] | None = None,
        **script: Any,
    ) -> None:
        """A model; `script` is what its worker reads."""
        if folder is None:
            folder = self.root / "models" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "script.json").write_text(json.dumps(script))
        self.models[name] = {"kind": kind, "folder": str(folder), "device": device, "options": options or {}}

    def write(self) -> None:
        self.path.write_text(json.dumps({"models": [{"name": name, **more} for name, more in self.models.items()]}))


class Front:
    """A running server and a client of it."""

    def __init__(self, config: Config, registry: Registry, session: aiohttp.ClientSession, address: str) -> None:
        self.config = config
        self.registry = registry
        self.session = session
        self.address = address

    async def reload(self) -> int:
        self.config.write()
        status, _ = await self.post("/v1/config/reload")
        return status

    async def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        async with self.session.post(path, json=body) as response:
            return response.status, await response.json()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(path) as response:
            text = await response.text()
            return response.status, json.loads(text) if text else None

    async def chat(self, *, model: str = "m", **body: Any) -> tuple[int, Any]:
        messages = [{"role": "user", "content": "hello"}]
        return await self.post("/v3/chat/completions", {"model": model, "messages": messages, **body})

    @asynccontextmanager
    async def streaming(
        self, path: str = "/v3/chat/completions", **body: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        request = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True, **body}
        async with self.session.post(path, json=request) as response:
            yield response

    async def events(self, path: str = "/v3/chat/completions", **body: Any) -> list[Any]:
        """All events of a stream; the last is "[DONE]" when it ended well."""
        async with self.streaming(path, **body) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            return parsed(await response.read())

    async def state(self, name: str) -> tuple[str, str]:
        _, states = await self.get("/v1/config")
        status = states[name]["model_version_status"][0]
        return status["state"], status["status"]["error_message"]

    async def settled(self, name: str = "m") -> tuple[str, str]:
        await asyncio.wait_for(self.registry.models[name].settled(), LIMIT)
        return await self.state(name)

    async def cancelled(self) -> list[int]:
        _, answer = await self.chat(script={"report": True})
        numbers: list[int] = json.loads(answer["choices"][0]["message"]["content"])
        return numbers


def parsed(data: bytes) -> list[Any]:
    blocks = data.decode().split("\n\n")
    assert blocks.pop() == ""
    events = [block.removeprefix("data: ") for block in blocks]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


Serve: TypeAlias = Callable[..., Awaitable[Front]]


@pytest_asyncio.fixture
async def serve(scratch: Path) -> AsyncIterator[Serve]:
    """Start a server: `front = await serve(max_queue=1)`, with a chat model `m` unless `empty`."""
    started: list[Any] = []

    async def start(*, empty: bool = False, worker: tuple[str, ...] = WORKER, **settings: Any) -> Front:
        config = Config(scratch)
        if not empty:
            config.add("m")
        config.write()
        registry = Registry(config.path, ModelSettings(**settings), worker, os.environ)
        runner, address = await serve_http(make_app(registry, KEY), str(scratch / "s.sock"), 0)
        started.append((registry, runner))
        connector = aiohttp.UnixConnector(address.removeprefix("unix:"), limit=0)
        headers = {"Authorization": f"Bearer {KEY}"}
        session = aiohttp.ClientSession("http://server", connector=connector, headers=headers)
        started.append((registry, session))
        front = Front(config, registry, session, address)
        assert await front.reload() == (200 if empty else 201)
        return front

    try:
        yield start
    finally:
        for registry, thing in reversed(started):
            await (thing.close() if isinstance(thing, aiohttp.ClientSession) else thing.cleanup())
            await registry.aclose()
