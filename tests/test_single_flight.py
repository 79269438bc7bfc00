"""Work shared by concurrent callers."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from engine_plugin.errors import InstallError, UnavailableError
from engine_plugin.single_flight import SingleFlight
from tests.patience import until, within


class Work:
    """Work that ends as a test decides."""

    def __init__(self) -> None:
        self.runs = 0
        self.cleaned_up = 0
        self.outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def __call__(self) -> str:
        self.runs += 1
        try:
            return await asyncio.shield(self.outcome)
        finally:
            await asyncio.sleep(0)
            self.cleaned_up += 1


async def callers(shared: SingleFlight[str], work: Work, count: int) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(shared.run(work)) for _ in range(count)]
    while not work.runs:  # noqa: ASYNC110  # it begins when the loop comes to it
        await asyncio.sleep(0)
    return tasks


async def test_concurrent_callers_share_one_result() -> None:
    shared, work = SingleFlight[str]("installing"), Work()
    tasks = await callers(shared, work, 20)
    work.outcome.set_result("done")
    assert await within(asyncio.gather(*tasks)) == ["done"] * 20
    assert work.runs == 1
    assert await within(shared.run(work)) == "done"
    assert work.runs == 2, "a run that has ended is not joined"


async def test_concurrent_callers_share_the_exception() -> None:
    shared, work = SingleFlight[str]("installing"), Work()
    tasks = await callers(shared, work, 5)
    work.outcome.set_exception(InstallError("disk full"))
    for outcome in await within(asyncio.gather(*tasks, return_exceptions=True)):
        assert isinstance(outcome, InstallError)
        assert str(outcome) == "disk full"


async def test_cancelled_run_cancels_all_callers() -> None:
    shared, work = SingleFlight[str]("starting llama.cpp"), Work()
    tasks = await callers(shared, work, 5)
    await within(shared.cancel())
    assert work.cleaned_up == 1, "cancel waits for the cleaning up"
    for outcome in await within(asyncio.gather(*tasks, return_exceptions=True)):
        assert type(outcome) is UnavailableError
        assert str(outcome) == "starting llama.cpp was interrupted by a stop"
    await within(shared.cancel())
    work.outcome.set_result("again")
    assert await within(shared.run(work)) == "again"
    await within(shared.cancel())


@pytest.mark.promise("F18")
async def test_call_during_a_cancellation_gets_a_new_run() -> None:
    shared, work = SingleFlight[str]("starting llama.cpp"), Work()
    tasks = await callers(shared, work, 1)
    cancelling = asyncio.create_task(shared.cancel())
    await asyncio.sleep(0)
    late = asyncio.create_task(shared.run(work))
    await within(cancelling)
    assert isinstance((await within(asyncio.gather(*tasks, return_exceptions=True)))[0], UnavailableError)
    work.outcome.set_result("new")
    assert await within(late) == "new"
    assert work.runs == 2


async def test_cancelled_caller_does_not_cancel_the_run() -> None:
    shared, work = SingleFlight[str]("installing"), Work()
    tasks = await callers(shared, work, 3)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    work.outcome.set_result("done")
    assert await within(asyncio.gather(*tasks[1:])) == ["done"] * 2
    assert work.runs == 1


async def test_run_without_callers_ends_without_an_unretrieved_error() -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    shared, work = SingleFlight[str]("installing"), Work()
    [task] = await callers(shared, work, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    work.outcome.set_exception(InstallError("disk full"))
    await until(lambda: bool(work.cleaned_up), "the work has ended")
    del shared, task
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_cancelled_cancel_raises_and_still_cancels_the_run() -> None:
    shared, work = SingleFlight[str]("installing"), Work()
    tasks = await callers(shared, work, 1)
    cancelling = asyncio.create_task(shared.cancel())
    await asyncio.sleep(0)
    cancelling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelling
    with pytest.raises(UnavailableError):
        await within(tasks[0])
