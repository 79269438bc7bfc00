"""A call that its host cancels, or whose deadline passes, stops the work in the default plugin's engine.

The tests measure the processor time of the model's process, not durations.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import DeadlineError
from tests.engines.llamacpp.running import eventually
from tests.engines.openvino.driver.running import MUCH, ONE_STEP, spent, still, tone
from tests.patience import pace

from .work import CHAT, LONG_PICTURE, LONG_TEXT, MODELS, draw, talk, write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import psutil

    from engine_plugin.host import PluginClient

    from .scene import HostedScene

pytestmark = pytest.mark.slow


async def works(worker: psutil.Process, since: float) -> None:
    """Wait until it has begun to work."""
    await eventually(lambda: spent(worker) > since + 0.05)


async def left(call: asyncio.Task[Any], _worker: psutil.Process) -> None:
    """Cancel a call that is under way."""
    assert not call.done()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def too_late(call: asyncio.Task[Any], worker: psutil.Process) -> None:
    """Let a call's time run out; its worker pauses meanwhile, so that a fast one cannot finish first."""
    worker.suspend()
    try:
        with pytest.raises(DeadlineError):
            await call
    finally:
        worker.resume()


@asynccontextmanager
async def loaded(scene: HostedScene) -> AsyncIterator[tuple[PluginClient, dict[str, psutil.Process]]]:
    """A plugin and its models' processes, which rest."""
    async with await scene.launch() as plugin:
        await plugin.start_engine()
        workers: dict[str, psutil.Process] = {}
        for name in MODELS:
            await plugin.load_model(name)
            [workers[name]] = set(scene.workers()) - set(workers.values())
        for worker in workers.values():
            await still(worker)
        yield plugin, workers


@pytest.mark.promise("F23", "F24", "P6")
async def test_cancelled_call_stops_the_engines_work(scene: HostedScene) -> None:
    """One after the other, so that each worker computes for one call only."""
    scene.configure({"generate": math.ceil(pace(0.7)), "speech-to-text": math.ceil(pace(1.5))})
    async with loaded(scene) as (plugin, workers):

        async def stops(
            model: str,
            work: Callable[[], Awaitable[Any]],
            end: Callable[[asyncio.Task[Any], psutil.Process], Awaitable[None]],
        ) -> None:
            worker, before = workers[model], spent(workers[model])
            call = asyncio.ensure_future(work())
            await works(worker, before)
            await end(call, worker)
            then = spent(worker)
            await still(worker)
            assert spent(worker) - then < MUCH, f"{model} worked on"

        await stops("tiny-image", lambda: draw(plugin, asyncio.Event()), left)
        await stops("tiny-image", lambda: plugin.invoke("text-to-image", LONG_PICTURE), left)
        assert (await plugin.invoke("text-to-image", ONE_STEP))["data"]
        await stops("tiny-transcribe", lambda: plugin.invoke("speech-to-text", {"audio": tone(300)}), left)
        await stops("tiny-transcribe", lambda: plugin.invoke("speech-to-text", {"audio": tone(300)}), too_late)
        await stops("tiny-transcribe", lambda: talk(plugin, asyncio.Event()), left)
        await eventually(lambda: scene.family("speech.decoder_program") == [])
        await stops("tiny-chat", lambda: plugin.invoke("generate", LONG_TEXT), too_late)
        await stops("tiny-chat", lambda: write(plugin, asyncio.Event()), left)
        assert (await plugin.invoke("chat", CHAT))["choices"]
        assert {worker.pid for worker in scene.workers()} == {worker.pid for worker in workers.values()}
