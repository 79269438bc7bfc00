"""The default plugin's server, or one of its workers, dies or hangs during calls of all kinds."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from engine_plugin.errors import EnginePluginError
from tests.engines.openvino.driver.running import ONE_STEP, PICTURE, tone
from tests.patience import LIMIT, pace

from .test_cancel import loaded
from .work import CHAT, LONG_TEXT, draw, talk, write

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from engine_plugin.host import PluginClient

    from .scene import HostedScene

pytestmark = pytest.mark.slow

TEXT = {**LONG_TEXT, "prompt": ["count"] * 16, "max_tokens": 100}
PICTURE_CALLS = ["pictures streamed", "pictures"]
PICTURES = {**PICTURE, "num_inference_steps": 50, "n": 1}


class Callers:
    """Eight callers at once, each of which repeats a short call until one fails or `stop` names it.

    The calls are short because a server that stands still is found out only once its workers have nothing to compute.
    """

    def __init__(self, plugin: PluginClient) -> None:
        self._stopped: set[str] = set()
        begun = self._begun = [asyncio.Event() for _ in range(3)]
        sound = {"audio": tone(2)}
        self.calls: dict[str, asyncio.Task[None]] = {
            "text": self._repeat("text", lambda: write(plugin, begun[0], TEXT)),
            "talk": self._repeat("talk", lambda: talk(plugin, begun[1])),
            "pictures streamed": self._repeat("pictures streamed", lambda: draw(plugin, begun[2], PICTURES)),
            "pictures": self._repeat("pictures", lambda: plugin.invoke("text-to-image", PICTURES)),
            "texts": self._repeat("texts", lambda: plugin.invoke("generate", TEXT)),
            "chat": self._repeat("chat", lambda: plugin.invoke("chat", CHAT)),
            "recording": self._repeat("recording", lambda: plugin.invoke("speech-to-text", sound)),
            "another": self._repeat("another", lambda: plugin.invoke("speech-to-text", sound)),
        }

    async def __aenter__(self) -> Callers:
        """Returns once the three that stream have received something."""
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(*(event.wait() for event in self._begun))
        return self

    async def __aexit__(self, *_exc: object) -> None:
        for call in self.calls.values():
            call.cancel()
        await asyncio.gather(*self.calls.values(), return_exceptions=True)

    def _repeat(self, name: str, call: Callable[[], Awaitable[Any]]) -> asyncio.Task[None]:
        async def repeat() -> None:
            while name not in self._stopped:
                await call()

        return asyncio.create_task(repeat())

    async def stop(self, names: list[str]) -> dict[str, str]:
        """Wait for the last call of each; returns the codes and messages of those that failed.

        A call made after a death would wait for the restart, and succeed.
        """
        self._stopped.update(names)
        _ended, not_ended = await asyncio.wait([self.calls[name] for name in names], timeout=LIMIT)
        assert not not_ended, [name for name in names if not self.calls[name].done()]
        return self.failures(names)

    async def conversation_goes_on_or_fails(self) -> None:
        """A conversation must not hang."""
        self._begun[1].clear()
        receives = asyncio.create_task(self._begun[1].wait())
        done, _ = await asyncio.wait(
            {receives, self.calls["talk"]}, timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED
        )
        receives.cancel()
        assert done, "the conversation hangs"

    def failures(self, names: list[str]) -> dict[str, str]:
        """The codes and messages of those that have failed."""
        failed: dict[str, str] = {}
        for name in names:
            call = self.calls[name]
            if call.done() and (error := call.exception()) is not None:
                assert isinstance(error, EnginePluginError)
                failed[name] = f"{error.code} {error}"
        return failed


async def all_answer(plugin: PluginClient) -> None:
    """Each kind of call works."""
    assert (await plugin.invoke("chat", CHAT))["choices"]
    assert (await plugin.invoke("text-to-image", ONE_STEP))["data"]
    assert "text" in await plugin.invoke("speech-to-text", {"audio": tone(1)})


@pytest.mark.promise("F20", "P2", "P3", "P5")
async def test_crash_during_eight_calls_fails_only_affected_calls(scene: HostedScene) -> None:
    """A worker's death fails its model's calls only; a server's death or hang fails every call that it had begun."""
    scene.configure({"chat": -1, "generate": -1}, health_interval=0.2, hung_timeout=pace(1))
    async with loaded(scene) as (plugin, workers):
        async with Callers(plugin) as callers:
            workers["tiny-image"].kill()
            failures = await callers.stop(PICTURE_CALLS)
            assert failures
            for failure in failures.values():
                assert failure == "502 the engine answered 500: the process of model tiny-image ended: SIGKILL"
            assert [name for name, call in callers.calls.items() if call.done()] == PICTURE_CALLS
            assert (await plugin.invoke("text-to-image", ONE_STEP))["data"]
        for hurt, words in ((psutil.Process.kill, "died: SIGKILL"), (psutil.Process.suspend, "hangs: no answer")):
            server = scene.server()
            async with Callers(plugin) as callers:
                hurt(server)
                # A conversation goes on with the next server if no part of it was being transcribed.
                failures = await callers.stop([name for name in callers.calls if name != "talk"])
                assert failures
                await callers.conversation_goes_on_or_fails()
                failures |= callers.failures(["talk"])
                for failure in failures.values():
                    assert failure.startswith(f"502 the OpenVINO server {words}")
            await all_answer(plugin)
            assert len(await plugin.running_models()) == 3
            assert len(scene.workers()) == 3
            assert server not in scene.family()
