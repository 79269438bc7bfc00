"""One spawned plugin for each engine, shared by all tests here."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from tests.engines.llamacpp.running import MARK, processes_of
from tests.engines.ollama.contract.handle import ContractServer
from tests.extras import needs
from tests.leftovers import marked
from tests.openvino_server.embedded import embedded_server

from .world import World, spawned

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["marked"]

SAMPLES = {
    "chat": "tiny-chat",
    "embed": "tiny-embed",
    "rerank": "tiny-rerank",
    "text-to-image": "tiny-image",
    "speech-to-text": "tiny-transcribe",
    "text-to-speech": "tiny-speak",
}
THREE = {kind: f"{SAMPLES[kind]}-gguf" for kind in ("chat", "embed", "rerank")}
REAL_OLLAMA = ("OLLAMA_TEST_HOST", "OLLAMA_TEST_MODEL", "OLLAMA_TEST_EMBED_MODEL")
ENGINES = ["llamacpp", "openvino", "ollama", "openai"]
if all(map(os.environ.get, REAL_OLLAMA)):
    ENGINES.append("real-ollama")


async def _llamacpp(stack: AsyncExitStack, place: Path) -> World:
    needs("xllamacpp")
    world = spawned("llamacpp", place, THREE, {}, backend="xllamacpp")
    return await stack.enter_async_context(world)


async def _openvino(stack: AsyncExitStack, place: Path) -> World:
    needs("openvino_genai")
    return await stack.enter_async_context(spawned("openvino", place, SAMPLES, {}, backend="embedded", threads=1))


async def _ollama(stack: AsyncExitStack, place: Path) -> World:
    """Return a plugin attached by OLLAMA_HOST to a server with Ollama's API."""
    server = await asyncio.to_thread(ContractServer, place / "ollama")
    stack.callback(server.close)
    models = {"chat": "tiny-chat:latest", "embed": "embed:latest", "speech-to-text": "audio:latest"}
    return await stack.enter_async_context(spawned("ollama", place, models, {"OLLAMA_HOST": server.address}))


async def _real_ollama(stack: AsyncExitStack, place: Path) -> World:
    """Return a plugin attached to the Ollama at OLLAMA_TEST_HOST, with the models there."""
    host, chat, embed = (os.environ[name] for name in REAL_OLLAMA)
    world = spawned("ollama", place, {"chat": chat, "embed": embed}, {"OLLAMA_HOST": host})
    return await stack.enter_async_context(world)


async def _openai(stack: AsyncExitStack, place: Path) -> World:
    """Return a plugin attached to the embedded server, which listens on a loopback port."""
    needs("openvino_genai")
    key = secrets.token_urlsafe(16)
    address = await stack.enter_async_context(embedded_server(place / "server", SAMPLES.values(), key))
    changes = {"engine_host": f"{address}/v3", "key_variable": "EMBEDDED_KEY", "send_key": "always"}
    return await stack.enter_async_context(spawned("openai", place, SAMPLES, {"EMBEDDED_KEY": key}, **changes))


MAKE: dict[str, Any] = {
    "llamacpp": _llamacpp,
    "openvino": _openvino,
    "ollama": _ollama,
    "real-ollama": _real_ollama,
    "openai": _openai,
}


@pytest_asyncio.fixture(scope="package", loop_scope="package", params=ENGINES)
async def world(request: pytest.FixtureRequest, marked: None) -> AsyncIterator[World]:
    """Yield the plugin of each engine in turn, and check that none leaves processes."""
    if sys.platform != "linux":
        pytest.skip("elsewhere offspring is not seen as a whole")
    place = Path(tempfile.mkdtemp(prefix="epa-"))
    try:
        async with AsyncExitStack() as stack:
            yield await MAKE[request.param](stack, place)
        left = [process for process in processes_of(os.environ[MARK]) if process.pid != os.getpid()]
        assert left == [], json.dumps([process.cmdline() for process in left])
    finally:
        shutil.rmtree(place)
