"""A cancelled call frees the engine at once."""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import DeadlineError
from tests.patience import LIMIT, pace

from .running import ENDLESS, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .conftest import Serve
    from .running import RunningPlugin

ROUNDS = 3
BOUND = 1.0  # seconds on an idle machine; measured are some hundredths


async def cancel_stream(running: RunningPlugin, request: dict[str, Any]) -> float:
    async with running.client.stream("generate", request) as chunks:
        await anext(chunks)
    return time.monotonic()


async def cancel_unary(running: RunningPlugin, request: dict[str, Any]) -> float:
    asking = asyncio.create_task(running.client.invoke("generate", request))
    await running.until_busy(request["model"])
    asking.cancel()
    cancelled = time.monotonic()
    with suppress(asyncio.CancelledError):
        await asking
    return cancelled


async def pass_unary_deadline(running: RunningPlugin, request: dict[str, Any]) -> float:
    with pytest.raises(DeadlineError):
        await running.client.invoke("generate", request, timeout=0.2)
    return time.monotonic()


@pytest.mark.promise("F23")
@pytest.mark.parametrize("cancel", [cancel_stream, cancel_unary, pass_unary_deadline])
async def test_cancelled_call_frees_the_only_slot(
    serve: Serve,
    cancel: Callable[[RunningPlugin, dict[str, Any]], Awaitable[float]],
    record_property: Callable[[str, object], None],
) -> None:
    running = await serve(parallel=1)
    model = ENDLESS.stem
    await running.client.load_model(model)
    endless = {"prompt": "a", "model": model, "max_tokens": 1_000_000, "ignore_eos": True}
    brief = {"prompt": "a", "model": model, "max_tokens": 1}
    slot, answer = [], []
    for _ in range(ROUNDS):
        cancelled = await cancel(running, endless)
        await running.until_idle(model)
        slot.append(time.monotonic() - cancelled)
        cancelled = await cancel(running, endless)
        await running.client.invoke("generate", brief)
        answer.append(time.monotonic() - cancelled)
    for name, times in (("slot", slot), ("answer", answer)):
        record_property(f"{name}_ms", [round(seconds * 1000, 1) for seconds in times])
        print(f"{cancel.__name__}: {name} after {statistics.median(times) * 1000:.0f} ms (max {max(times):.3f} s)")
    assert statistics.median(slot) < pace(BOUND)
    assert statistics.median(answer) < pace(BOUND)


@pytest.mark.promise("F23", "P8")
async def test_call_that_waits_for_a_slot_can_be_cancelled(serve: Serve) -> None:
    """Nine of ten waiting calls are cancelled; the tenth is next."""
    running = await serve(parallel=1)
    model = ENDLESS.stem
    endless = {"prompt": "a", "model": model, "max_tokens": 1_000_000, "ignore_eos": True}
    brief = {"prompt": "a", "model": model, "max_tokens": 1}
    async with running.client.stream("generate", endless) as chunks:
        await anext(chunks)
        queue = [asyncio.create_task(running.client.invoke("generate", endless)) for _ in range(9)]
        last = asyncio.create_task(running.client.invoke("generate", brief))
        admission = running.server(model).admission
        await eventually(lambda: admission.waiting == 10)
        for task in queue:
            task.cancel()
        await asyncio.gather(*queue, return_exceptions=True)
    async with asyncio.timeout(LIMIT):
        assert (await last)["choices"]
    await running.until_idle(model)
    assert not admission.waiting
    assert running.engine.pool.users(model) == 0


@pytest.mark.promise("F23", "P6")
async def test_timeout_of_the_manifest_frees_the_slot(serve: Serve) -> None:
    def one_second(shape: dict[str, Any]) -> None:
        for service in shape["services"]:
            service["timeout"] = 1

    running = await serve(parallel=1, change=one_second)
    model = ENDLESS.stem
    await running.client.load_model(model)
    endless = {"prompt": "a", "model": model, "max_tokens": 1_000_000, "ignore_eos": True}
    with pytest.raises(DeadlineError, match=r"generate: not done in 1 s\. Raise services\[\]\.timeout"):
        await running.client.invoke("generate", endless)
    await running.until_idle(model)
    async with running.client.stream("generate", endless) as chunks:
        with pytest.raises(DeadlineError, match="generate: not done in 1 s"):
            async for _ in chunks:
                pass
    await running.until_idle(model)
