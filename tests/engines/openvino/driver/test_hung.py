"""A hung worker: health reports it, its requests fail, and its model is restarted or unloaded in time."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import BadGatewayError, UnavailableError
from tests.engines.llamacpp.running import eventually
from tests.patience import LIMIT, pace

from .running import COUNT
from .test_memory import served, writing

if TYPE_CHECKING:
    from .conftest import Serve

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGSTOP")]


async def test_hung_worker_is_degraded_then_restarted(serve: Serve) -> None:
    running = await serve(hung_timeout=pace(1.5))
    await running.client.load_model("tiny-embed")
    async with writing(running) as texts:
        running.workers()[-1].send_signal(signal.SIGSTOP)
        async with asyncio.timeout(LIMIT):
            while (health := await running.client.health_check()).startswith("ready"):  # noqa: ASYNC110  # no event says so
                await asyncio.sleep(0.02)
        assert health.startswith("degraded: tiny-chat does not answer: it seems to hang")
        assert (await running.client.invoke("embed", {"input": "a"}))["data"], "the other model serves"
        with pytest.raises(BadGatewayError, match="it hangs: no answer, output or use of the processor for "):
            await asyncio.wait_for(texts, LIMIT)
    assert await asyncio.wait_for(running.client.invoke("chat", COUNT), LIMIT)
    assert await running.client.health_check() == "ready: 2 models loaded"


async def test_health_reports_the_reason_during_a_restart(serve: Serve) -> None:
    running = await serve(restart_backoff=30)
    await running.client.load_model("tiny-chat")
    [worker] = running.workers()
    worker.kill()
    async with asyncio.timeout(LIMIT):
        while (health := await running.client.health_check()).startswith("ready"):  # noqa: ASYNC110  # no event says so
            await asyncio.sleep(0.02)
    assert health.startswith("degraded: tiny-chat is being loaded again: its process ended and is being restarted:")
    assert "SIGKILL" in health


async def test_unload_does_not_wait_for_a_hung_worker(serve: Serve) -> None:
    running = await serve(drain_timeout=0.5, hung_timeout=0)
    async with writing(running) as texts:
        worker = running.workers()[-1]
        worker.send_signal(signal.SIGSTOP)
        await asyncio.wait_for(running.client.unload_model("tiny-chat"), LIMIT)
        with pytest.raises(UnavailableError, match="unloaded during this request"):
            await texts
    await eventually(lambda: not running.workers())
    assert served(running) == []
