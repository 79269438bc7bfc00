"""Bounded waits, also in a cancelled task."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time

import pytest

from engine_plugin.waiting import comes_true, handle_signal
from tests.patience import LIMIT


async def test_wait_returns_in_time_or_raises_timeout() -> None:
    event = asyncio.Event()
    assert not await comes_true(event.wait(), 0.01)
    event.set()
    assert await comes_true(event.wait(), 10)


async def test_error_of_the_awaited_work_is_raised() -> None:
    async def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await comes_true(fail(), 10)


@pytest.mark.promise("F24")
async def test_wait_is_bounded_in_the_cleanup_of_a_cancelled_task() -> None:
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


async def test_late_wait_is_cancelled() -> None:
    ended = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    assert not await comes_true(wait(), 0.01)
    await asyncio.wait_for(ended.wait(), LIMIT)


@pytest.mark.skipif(sys.platform == "win32", reason="there every signal wakes the loop, and none comes from a thread")
async def test_signal_wakes_an_idle_event_loop() -> None:
    """A signal delivered to another thread does not interrupt the main thread's wait; only the wake-up does."""
    loop, heard = asyncio.get_running_loop(), asyncio.Event()
    before = signal.getsignal(signal.SIGUSR1)
    handle_signal(signal.SIGUSR1, lambda _number, _frame: loop.call_soon_threadsafe(heard.set))
    going_to_sleep = threading.Event()

    def send() -> None:
        going_to_sleep.wait(LIMIT)
        time.sleep(0.2)  # nothing tells that the main thread has begun to wait
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        began = loop.time()
        loop.call_soon(going_to_sleep.set)
        await asyncio.wait_for(heard.wait(), LIMIT)
        assert loop.time() - began < 9, "the end of the wait woke the loop, not the signal"
    finally:
        sender.join(10)
        loop.remove_signal_handler(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, before)
