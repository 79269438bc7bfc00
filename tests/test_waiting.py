"""Bounded waits, in a task that was cancelled too."""

from __future__ import annotations

import asyncio

import pytest

from engine_plugin.waiting import comes_true


async def test_in_time_and_late() -> None:
    event = asyncio.Event()
    assert not await comes_true(event.wait(), 0.01)
    event.set()
    assert await comes_true(event.wait(), 10)


async def test_an_error_is_raised() -> None:
    async def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await comes_true(fail(), 10)


async def test_while_a_cancelled_task_cleans_up() -> None:
    cleaned = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            assert not await comes_true(asyncio.Event().wait(), 0.01)
            cleaned.set()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned.is_set()


async def test_a_late_event_is_cancelled() -> None:
    ended = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    assert not await comes_true(wait(), 0.01)
    await asyncio.wait_for(ended.wait(), 10)
