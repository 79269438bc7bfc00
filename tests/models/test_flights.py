"""Several callers pull one model; callers go away; the store closes."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from engine_plugin.download.events import ChunkProgress, PullEvent, StepStarted, Success
from engine_plugin.download.source import HttpSource
from engine_plugin.errors import ModelNotFoundError, PreconditionError, UnavailableError
from engine_plugin.models.flights import PullFlights
from engine_plugin.models.request import PullPlan
from engine_plugin.models.store import ModelStore, PullRequest
from tests.models.fakes import digest_of, files_below, pull
from tests.models.server import FileServer, Script
from tests.models.test_resume import until_progress
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PLAN = PullPlan("m", HttpSource("http://h/m.gguf"), "", "", insecure=False)


async def planned() -> PullPlan:
    return PLAN


@pytest.mark.promise("P17")
async def test_two_callers_share_one_download(store: ModelStore, server: FileServer, data: bytes) -> None:
    script = Script(stall_after=100_000)
    server.scripts.append(script)
    request = PullRequest(server.url())
    async with (
        asyncio.timeout(LIMIT),
        aclosing(store.pull(request)) as first,
        aclosing(store.pull(request)) as second,
    ):
        await until_progress(first)
        joined = [await anext(second), await anext(second)]
        assert isinstance(joined[0], StepStarted)
        assert isinstance(joined[1], ChunkProgress)
        script.go.set()
        ends = [[event async for event in events][-1] for events in (first, second)]
    assert ends == [Success("model", len(data), f"sha256:{digest_of(data)}")] * 2
    assert len(server.requests) == 1


@pytest.mark.promise("P17")
async def test_last_caller_to_leave_cancels_the_download(
    store: ModelStore, server: FileServer, root: Path, data: bytes
) -> None:
    server.scripts.append(Script(stall_after=100_000))
    request = PullRequest(server.url())
    second = store.pull(request)
    async with asyncio.timeout(LIMIT), aclosing(second):
        async with aclosing(store.pull(request)) as first:
            await until_progress(first)
            await anext(second)
        assert (await anext(second)) is not None
        assert len(server.requests) == 1
    size = (root / ".partial/model.part").stat().st_size
    assert (await pull(store, request))[-1] == Success("model", len(data), f"sha256:{digest_of(data)}")
    assert [found.range for found in server.requests] == ["", f"bytes={size}-"]


async def test_a_cancelled_task_leaves_the_pull(store: ModelStore, server: FileServer, root: Path) -> None:
    server.scripts.append(Script(stall_after=100_000))
    progressed = asyncio.Event()

    async def watch() -> None:
        async with aclosing(store.pull(PullRequest(server.url()))) as events:
            await until_progress(events)
            progressed.set()
            async for _ in events:
                pass

    task = asyncio.create_task(watch())
    async with asyncio.timeout(LIMIT):
        await progressed.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert files_below(root) == {".partial/model.part", ".partial/model.json"}
    await store.delete("model")  # the lock is free


async def test_failure_is_raised_for_both_callers(store: ModelStore, server: FileServer) -> None:
    server.scripts.append(Script(status=404))
    request = PullRequest(server.url())
    ends = await asyncio.gather(pull(store, request), pull(store, request), return_exceptions=True)
    assert [type(end) for end in ends] == [ModelNotFoundError, ModelNotFoundError]
    assert len(server.requests) == 1


async def test_other_pull_of_the_same_name_is_rejected(store: ModelStore, server: FileServer) -> None:
    server.scripts.append(Script(stall_after=100_000))
    async with aclosing(store.pull(PullRequest(server.url()))) as events:
        await until_progress(events)
        for other in (
            PullRequest("model", source=server.url("/another.gguf")),
            PullRequest("MODEL", source=server.url()),
            PullRequest(server.url(), insecure=True),
            PullRequest(server.url(), model_type="embed"),
        ):
            with pytest.raises(PreconditionError, match="model is being pulled now"):
                await pull(store, other)
        with pytest.raises(PreconditionError, match="being pulled now"):
            await store.delete("model")


async def test_closing_the_store_ends_its_pulls(store: ModelStore, server: FileServer, root: Path) -> None:
    server.scripts.append(Script(stall_after=100_000))
    async with aclosing(store.pull(PullRequest(server.url()))) as events:
        await until_progress(events)
        await store.aclose()
        with pytest.raises(UnavailableError, match="kept for the next pull"):
            async for _ in events:
                pass
    assert ".partial/model.part" in files_below(root)


async def test_slow_caller_gets_every_status_and_the_latest_progress() -> None:
    async def run(_: PullPlan, publish: object) -> Success:
        assert callable(publish)
        publish(StepStarted("one"))
        for completed in range(1000):
            publish(ChunkProgress("", completed, 1000))
        publish(StepStarted("two"))
        publish(ChunkProgress("", 1000, 1000))
        return Success("m", 1000, "")

    flights = PullFlights(run)
    seen: list[PullEvent] = [event async for event in flights.pull(planned)]
    assert seen == [
        StepStarted("one"),
        ChunkProgress("", 999, 1000),
        StepStarted("two"),
        ChunkProgress("", 1000, 1000),
        Success("m", 1000, ""),
    ]
    assert [event async for event in flights.pull(planned)][-1] == Success("m", 1000, "")


async def test_slow_caller_loses_the_oldest_of_many_events() -> None:
    told = asyncio.Event()

    async def run(_plan: PullPlan, publish: Callable[[PullEvent], None]) -> Success:
        for number in range(5000):
            publish(StepStarted(f"step {number}"))
        told.set()
        return Success("m", 1, "sha256:00")

    async with asyncio.timeout(LIMIT), aclosing(PullFlights(run).pull(planned)) as events:
        seen = [await anext(events)]
        await told.wait()
        seen += [event async for event in events]
    assert seen[-2:] == [StepStarted("step 4999"), Success("m", 1, "sha256:00")]
    assert len(seen) < 1100
