"""Hung workers with calls are killed; workers that compute or are idle are not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from openvino_server import watch
from tests.openvino_server.serving.test_calls import HELD, first_bytes, until_owed
from tests.patience import LIMIT, NEVER, pace

if TYPE_CHECKING:
    from openvino_server.link import Worker
    from tests.openvino_server.serving.conftest import Front, Serve

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGSTOP")


async def worker_of(front: Front, model: str = "m") -> Worker:
    async with front.registry.models[model].use() as worker:
        return worker


def stop(worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGSTOP)


def go_on(worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGCONT)


async def ready(front: Front, status: int) -> None:
    """Wait until /v2/health/ready has this status."""
    async with asyncio.timeout(LIMIT):
        while (await front.get("/v2/health/ready"))[0] != status:  # noqa: ASYNC110  # no event says so
            await asyncio.sleep(0.01)


async def refused(front: Front, **script: Any) -> str:
    status, answer = await asyncio.wait_for(front.chat(script=script), LIMIT)
    assert status == 500
    message: str = answer["error"]["message"]
    return message


async def test_hung_worker_fails_its_calls_and_is_restarted(serve: Serve) -> None:
    front = await serve(hung_timeout=pace(0.3), restart_backoff=0.01)
    before = await worker_of(front)
    async with front.streaming(script=HELD) as held:
        assert "hangs: no answer, output or use of the processor for " in await refused(front, then="hold")
        last = (await held.content.read()).decode().strip().split("data: ")[-1]
        assert "hangs" in json.loads(last)["error"]["message"]
    assert (await front.chat())[0] == 200, "of a new worker"
    assert (await worker_of(front)).pid != before.pid


async def test_worker_suspended_during_a_computation_is_killed(serve: Serve) -> None:
    front = await serve(hung_timeout=pace(0.3), restart_backoff=0.01)
    async with contextlib.AsyncExitStack() as stack:
        await first_bytes(front, stack, parts=HELD["parts"], then="compute", seconds=1000)
        call = asyncio.create_task(refused(front))
        stop(await worker_of(front))
        assert "hangs" in await call
    assert (await front.chat())[0] == 200


@pytest.mark.parametrize("then", ["compute", "delegate"])
async def test_long_computation_is_not_interrupted(serve: Serve, then: str) -> None:
    front = await serve(hung_timeout=pace(0.4))
    before = await worker_of(front)
    status, _ = await asyncio.wait_for(front.chat(script={"then": then, "seconds": pace(1)}), LIMIT)
    assert status == 200
    assert await worker_of(front) is before


async def test_suspended_idle_worker_is_not_killed(serve: Serve) -> None:
    front = await serve(hung_timeout=pace(0.3), restart_backoff=NEVER)
    front.config.add("other")
    assert await front.reload() == 201
    assert (await front.chat())[0] == 200
    idle = await worker_of(front)
    stop(idle)
    status, _ = await asyncio.wait_for(front.chat(model="other", script={"then": "hold"}), LIMIT)
    assert status == 500, "hung_timeout has passed for a worker with a call"
    go_on(idle)
    assert (await front.chat())[0] == 200
    assert await worker_of(front) is idle


async def test_hung_worker_is_killed_although_its_call_was_cancelled(serve: Serve) -> None:
    front = await serve(hung_timeout=pace(0.5), restart_backoff=0.01)
    worker = await worker_of(front)
    stop(worker)
    call = asyncio.create_task(front.chat())
    await until_owed(front)
    call.cancel()
    await asyncio.wait_for(worker.over.wait(), LIMIT)
    assert "hangs" in worker.ended_because
    assert (await front.chat())[0] == 200


async def test_health_reports_a_suspended_worker_until_it_continues(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "INTERVAL", 0.05)
    front = await serve(hung_timeout=0)
    worker = await worker_of(front)
    async with contextlib.AsyncExitStack() as stack:
        await first_bytes(front, stack)
        stop(worker)
        await ready(front, 503)
        state, message = await front.state("m")
        assert state == "AVAILABLE"
        assert message.startswith("it seems to hang: no answer, output or use of the processor for ")
        assert (await front.get("/v3/models"))[1]["data"] == []
        go_on(worker)
        assert (await asyncio.wait_for(front.chat(script={"release": True}), LIMIT))[0] == 200
    await ready(front, 200)
    assert await front.state("m") == ("AVAILABLE", "")
    assert await worker_of(front) is worker


async def test_health_reports_the_reason_of_a_restart(serve: Serve) -> None:
    front = await serve(hung_timeout=pace(0.3), restart_backoff=NEVER)
    await refused(front, then="hold")
    await ready(front, 503)
    state, message = await front.state("m")
    assert state == "LOADING"
    assert message.startswith("its process ended and is being restarted: it hangs")


@pytest.mark.parametrize("load", ["hang", "compute"])
async def test_worker_that_hangs_during_its_load_fails_the_load(serve: Serve, load: str) -> None:
    front = await serve(empty=True, start_timeout=pace(0.5))
    front.config.add("m", load=load, seconds=1000)
    front.config.write()
    loading = asyncio.create_task(front.post("/v1/config/reload"))
    if load == "compute":
        async with asyncio.timeout(LIMIT):
            while (model := front.registry.models.get("m")) is None or model.worker is None:
                await front.get("/v1/config")
        stop(model.worker)
    status, answer = await asyncio.wait_for(loading, LIMIT)
    assert status == 500
    assert "hangs while it loads: no output or use of the processor for " in answer["error"]
    assert (await front.state("m"))[0] == "END"


async def test_long_load_is_not_interrupted(serve: Serve) -> None:
    front = await serve(empty=True, start_timeout=pace(0.4))
    front.config.add("m", load="compute", seconds=pace(1))
    assert await asyncio.wait_for(front.reload(), LIMIT) == 201


@pytest.mark.parametrize("change", ["unload", "reload"])
@pytest.mark.parametrize("busy", [True, False])
async def test_suspended_worker_is_unloaded_within_the_drain_timeout(serve: Serve, change: str, busy: bool) -> None:
    front = await serve(drain_timeout=0.5, hung_timeout=0)
    worker = await worker_of(front)
    async with contextlib.AsyncExitStack() as stack:
        if busy:
            await first_bytes(front, stack)
        stop(worker)
        front.config.models.clear()
        if change == "reload":
            front.config.add("m", options={"max_num_seqs": 3})
        leaving = asyncio.create_task(front.reload())
        await asyncio.wait_for(worker.over.wait(), LIMIT)
        assert await asyncio.wait_for(leaving, LIMIT) == 201
