"""The default plugin's server, or one of its workers, dies or stands still under calls of all kinds."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from engine_plugin.errors import EnginePluginError
from tests.openvino.driver.running import ONE_STEP, PICTURE, tone
from tests.patience import LIMIT, pace

from .test_cancel import loaded
from .work import CHAT, LONG_TEXT, draw, talk, write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from engine_plugin.host import PluginClient

    from .scene import HostedScene

pytestmark = pytest.mark.slow

TEXT = {**LONG_TEXT, "prompt": ["count"] * 16, "max_tokens": 100}
PICTURES = {**PICTURE, "num_inference_steps": 50, "n": 1}


@asynccontextmanager
async def mixed(plugin: PluginClient) -> AsyncIterator[dict[str, asyncio.Task[Any]]]:
    """Eight callers at once, each of which goes on until a call of his fails; those who stream have begun.

    Each call is short, since a server that stands still is known to once its workers have nothing left to compute.
    """
    begun = [asyncio.Event() for _ in range(3)]
    sound = {"audio": tone(2)}
    calls: dict[str, asyncio.Task[Any]] = {
        "text": asyncio.create_task(_again(lambda: write(plugin, begun[0], TEXT))),
        "talk": asyncio.create_task(talk(plugin, begun[1])),
        "pictures streamed": asyncio.create_task(_again(lambda: draw(plugin, begun[2], PICTURES))),
        "pictures": asyncio.create_task(_again(lambda: plugin.invoke("text-to-image", PICTURES))),
        "texts": asyncio.create_task(_again(lambda: plugin.invoke("generate", TEXT))),
        "chat": asyncio.create_task(_again(lambda: plugin.invoke("chat", CHAT))),
        "recording": asyncio.create_task(_again(lambda: plugin.invoke("speech-to-text", sound))),
        "another": asyncio.create_task(_again(lambda: plugin.invoke("speech-to-text", sound))),
    }
    try:
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(*(event.wait() for event in begun))
        yield calls
    finally:
        for call in calls.values():
            call.cancel()
        await asyncio.gather(*calls.values(), return_exceptions=True)


async def _again(call: Callable[[], Awaitable[Any]]) -> None:
    while True:
        await call()


async def complaints(calls: dict[str, asyncio.Task[Any]]) -> list[str]:
    """What each call ended with: the code and the words."""
    _done, unended = await asyncio.wait(calls.values(), timeout=LIMIT)
    assert not unended, [name for name, call in calls.items() if call in unended]
    told = []
    for call in calls.values():
        with pytest.raises(EnginePluginError) as caught:
            await call
        told.append(f"{caught.value.code} {caught.value}")
    return told


async def all_answer(plugin: PluginClient) -> None:
    """Each kind of call works."""
    assert (await plugin.invoke("chat", CHAT))["choices"]
    assert (await plugin.invoke("text-to-image", ONE_STEP))["data"]
    assert "text" in await plugin.invoke("speech-to-text", {"audio": tone(1)})


@pytest.mark.promise("F20", "P2", "P3", "P5")
async def test_under_eight_calls(scene: HostedScene) -> None:
    """The death of the server, and its frost, are everybody's; the death of a worker is its model's alone."""
    scene.configure({"chat": -1, "generate": -1}, health_interval=0.2, hung_timeout=pace(1))
    async with loaded(scene) as (plugin, workers):
        async with mixed(plugin) as calls:
            workers["tiny-image"].kill()
            pictures = {name: calls[name] for name in calls if "pictures" in name}
            for complaint in await complaints(pictures):
                assert complaint == "502 the engine answered 500: the process of model tiny-image ended: SIGKILL"
            assert [name for name, call in calls.items() if call.done()] == list(pictures)
            assert (await plugin.invoke("text-to-image", ONE_STEP))["data"]
        for hurt, words in ((psutil.Process.kill, "died: SIGKILL"), (psutil.Process.suspend, "hangs: no answer")):
            server = scene.server()
            async with mixed(plugin) as calls:
                hurt(server)
                for complaint in await complaints(calls):
                    assert complaint.startswith(f"502 the OpenVINO server {words}")
            await all_answer(plugin)
            assert len(await plugin.running_models()) == 3
            assert len(scene.workers()) == 3
            assert server not in scene.family()
