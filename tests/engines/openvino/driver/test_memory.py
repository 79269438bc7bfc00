"""Loads, evictions and unloads of models in the server's memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import engine_plugin
from engine_plugin.errors import (
    EnginePluginError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from engine_plugin.host import events
from tests.engines.llamacpp.running import eventually
from tests.patience import LIMIT

from .running import COUNT, FEW_TEXTS, MUCH, ONE_STEP, PICTURE, TEXTS, spent, still

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .conftest import Serve
    from .running import RunningEngine

pytestmark = pytest.mark.slow

SAMPLES = Path(engine_plugin.__file__).parent / "samples" / "openvino"


async def read(running: RunningEngine, begun: asyncio.Event, service: str, request: dict[str, Any]) -> dict[str, Any]:
    """Read a stream to its end; its last event. `begun` is set at the first."""
    last: dict[str, Any] = {}
    async with running.client.stream(service, request) as chunks:
        async for event in events(chunks):
            last = event
            begun.set()
    return last


@contextlib.asynccontextmanager
async def streaming(
    running: RunningEngine, service: str, request: dict[str, Any]
) -> AsyncIterator[asyncio.Task[dict[str, Any]]]:
    """A stream that has begun and is read until the end of the block."""
    begun = asyncio.Event()
    task = asyncio.create_task(read(running, begun, service, request))
    try:
        async with asyncio.timeout(LIMIT):
            await begun.wait()
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def drawing(
    running: RunningEngine, **request: Any
) -> contextlib.AbstractAsyncContextManager[asyncio.Task[dict[str, Any]]]:
    """`streaming` of pictures."""
    return streaming(running, "text-to-image", {**PICTURE, **request})


def writing(
    running: RunningEngine, texts: dict[str, Any] = TEXTS, **request: Any
) -> contextlib.AbstractAsyncContextManager[asyncio.Task[dict[str, Any]]]:
    """`streaming` of texts, whose model loads in half the time."""
    return streaming(running, "generate", {**texts, **request})


def served(running: RunningEngine) -> list[str]:
    """What config.json names."""
    shape = json.loads(running.server.served.config.read_text())
    return sorted(entry["name"] for entry in shape["models"])


def lay_in(running: RunningEngine, name: str, sample: str = "tiny-embed") -> Path:
    """A copy of a sample among the models that one may delete."""
    folder = running.engine.manifest.data_dir / "models" / name
    shutil.copytree(SAMPLES / sample, folder)
    return folder


async def test_concurrent_first_use_loads_once(serve: Serve) -> None:
    running = await serve()
    assert running.workers() == []
    await asyncio.gather(
        *(running.client.invoke("chat", COUNT) for _ in range(5)),
        *(running.client.load_model("tiny-chat") for _ in range(5)),
        *(running.client.load_model("tiny-embed") for _ in range(5)),
    )
    assert len(running.workers()) == 2
    assert await running.loaded() == served(running) == ["tiny-chat", "tiny-embed"]


async def test_a_second_model_evicts_the_first_after_its_stream(serve: Serve) -> None:
    running = await serve(max_loaded_models=1)
    async with writing(running, FEW_TEXTS) as texts:
        assert (await running.client.invoke("embed", {"input": "a"}))["data"]
        assert texts.done()
        assert (await texts)["choices"][0]["finish_reason"] == "length"
    assert await running.loaded() == served(running) == ["tiny-embed"]
    assert len(running.workers()) == 1


async def test_model_beyond_the_memory_limit_is_rejected(serve: Serve) -> None:
    running = await serve(memory_limit=1)
    await running.client.invoke("chat", COUNT)
    with pytest.raises(
        PreconditionError, match=r"tiny-image needs .* of memory, and engine.memory_limit in plugin.yaml allows 1"
    ):
        await running.client.invoke("text-to-image", PICTURE)
    assert await running.loaded() == ["tiny-chat"]


async def test_unload_waits_for_a_stream(serve: Serve) -> None:
    running = await serve()
    async with writing(running, FEW_TEXTS) as texts:
        await running.client.unload_model("tiny-chat")
        assert texts.done()
        assert (await texts)["choices"][0]["finish_reason"] == "length"
    assert await running.loaded() == served(running) == running.workers() == []
    with pytest.raises(PreconditionError, match="tiny-chat is not loaded"):
        await running.client.unload_model("tiny-chat")


async def test_unload_cancels_requests_after_the_drain_timeout(serve: Serve) -> None:
    running = await serve(drain_timeout=0.2)
    async with writing(running) as texts:
        await running.client.unload_model("tiny-chat")
        with pytest.raises(UnavailableError, match="unloaded during this request"):
            await texts
    assert running.workers() == []
    assert await running.client.invoke("chat", COUNT)


async def test_deleted_model_is_unloaded(serve: Serve) -> None:
    running = await serve()
    folder = lay_in(running, "owner/mine", "tiny-chat")
    async with writing(running, model="owner/mine"):
        with pytest.raises(PreconditionError, match="owner/mine is answering 1 requests"):
            await running.client.delete_model("owner/mine")
    await eventually(lambda: running.engine.pool.users("owner/mine") == 0)
    assert await running.loaded() == served(running) == ["owner/mine"]
    await running.client.delete_model("owner/mine")
    assert await running.loaded() == served(running) == running.workers() == []
    assert not folder.exists()
    with pytest.raises(NotFoundError):
        await running.client.invoke("chat", {**COUNT, "model": "owner/mine"})


async def test_failed_load_is_reported_and_retried(serve: Serve) -> None:
    """The reason is reported, other models are not delayed, and the next call retries the load."""
    running = await serve()
    folder = lay_in(running, "broken")
    graph = folder / "openvino_model.xml"
    good = graph.read_bytes()
    await running.client.list_models()  # the store looks at a model once
    graph.write_bytes(good[: len(good) // 2])
    outcomes = await asyncio.gather(
        running.client.invoke("embed", {"input": "a", "model": "broken"}),
        running.client.invoke("embed", {"input": "a", "model": "tiny-embed"}),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], EnginePluginError), outcomes[0]
    assert not isinstance(outcomes[1], BaseException), outcomes[1]
    assert "broken" in str(outcomes[0])
    assert await running.loaded() == ["tiny-embed"]
    assert (await running.client.health_check()).startswith("ready")
    graph.write_bytes(good)
    assert await running.client.invoke("embed", {"input": "a", "model": "broken"})
    assert await running.loaded() == served(running) == ["broken", "tiny-embed"]


async def test_cancelled_call_stops_the_computation(serve: Serve) -> None:
    running = await serve()
    asked = {**PICTURE, "size": "256x256"}  # more than ten seconds of the processor's time

    async def stopped() -> None:
        """The worker takes little more of the processor's time, and answers the next call."""
        await eventually(lambda: running.engine.pool.users("tiny-image") == 0)
        before = spent(worker)
        await still(worker)
        assert spent(worker) - before < MUCH
        async with asyncio.timeout(LIMIT):
            await running.client.invoke("text-to-image", ONE_STEP)

    async with drawing(running, **asked):
        assert running.engine.pool.users("tiny-image") == 1
        [worker] = running.workers()
    await stopped()
    before = spent(worker)
    unary = asyncio.create_task(running.client.invoke("text-to-image", asked))
    await eventually(lambda: spent(worker) > before + 0.05)
    unary.cancel()
    await asyncio.gather(unary, return_exceptions=True)
    await stopped()


async def test_calls_before_a_start_are_rejected(serve: Serve) -> None:
    running = await serve(start=False)
    for service, request in (("chat", COUNT), ("text-to-image", PICTURE)):
        with pytest.raises(UnavailableError, match="Call StartEngine"):
            await running.client.invoke(service, request)
    with pytest.raises(UnavailableError, match="Call StartEngine"):
        await running.client.load_model("tiny-chat")


async def test_load_fails_after_the_load_limit(serve: Serve) -> None:
    running = await serve()
    running.server.load_limit = 0.05
    with pytest.raises(UnavailableError, match=r"tiny-image was not loaded in 0.05 s. Raise engine.start_limit"):
        await running.client.load_model("tiny-image")
    assert await running.loaded() == served(running) == running.workers() == []
