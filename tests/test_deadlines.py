"""Deadlines of calls."""

from __future__ import annotations

import asyncio

import pytest

from engine_plugin.deadlines import STREAM, UNARY, allowed, deadline
from engine_plugin.errors import DeadlineError
from engine_plugin.manifest import ServiceCapabilities, ServiceSpec


def spec(timeout: int) -> ServiceSpec:
    return ServiceSpec(
        service_name="chat",
        task_type="",
        protocol="",
        expose_protocol="",
        endpoint="",
        auth_type="",
        auth_fields=(),
        default_model="",
        support_models=(),
        config_ref="",
        timeout=timeout,
        capabilities=ServiceCapabilities(support_streaming=True, support_bidirectional=True),
    )


@pytest.mark.parametrize(
    ("timeout", "unary", "stream", "bidi"),
    [(0, UNARY, STREAM, None), (5, 5.0, 5.0, 5.0), (-1, None, None, None), (-7, None, None, None)],
)
def test_default_deadlines_are_those_of_the_host(
    timeout: int, unary: float | None, stream: float | None, bidi: float | None
) -> None:
    """60 s for a unary call and 300 s for a stream are what the host itself allows."""
    assert (UNARY, STREAM) == (60.0, 300.0)
    service = spec(timeout)
    assert allowed(service, "unary") == unary
    assert allowed(service, "stream") == stream
    assert allowed(service, "bidi") == bidi


async def test_passed_deadline_cancels_the_block() -> None:
    cancelled = asyncio.Event()

    async def late() -> None:
        async with deadline(0.01, "chat", "Raise it"):
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

    with pytest.raises(DeadlineError, match=r"^chat: not done in 0\.01 s\. Raise it$"):
        await late()
    assert cancelled.is_set()


async def test_missing_deadline_and_missing_fix_are_allowed() -> None:
    async with deadline(None, "chat"):
        await asyncio.sleep(0)
    with pytest.raises(DeadlineError, match=r"^StopEngine: not done in 0 s\. Try again; the log"):
        async with deadline(0, "StopEngine"):
            await asyncio.Event().wait()


async def test_inner_timeout_is_not_taken_for_the_deadline() -> None:
    with pytest.raises(TimeoutError) as raised:
        async with deadline(10, "chat"):
            raise TimeoutError("the engine's own")
    assert str(raised.value) == "the engine's own"


async def test_cancellation_from_outside_stays_a_cancellation() -> None:
    async def work() -> None:
        async with deadline(10, "chat"):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
