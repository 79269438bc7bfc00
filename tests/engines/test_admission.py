"""Admission of requests to an engine's slots."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.engines.local.admission import Admission, ClosedError
from engine_plugin.errors import UnavailableError
from tests.patience import LIMIT, within

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.mark.promise("U10")
async def test_close_rejects_queued_calls_and_lets_running_ones_end() -> None:
    crowd = Crowd(1)
    running, *waiting = [crowd.come() for _ in range(3)]
    while not crowd.held:  # noqa: ASYNC110  # a step of the loop or two
        await asyncio.sleep(0)
    crowd.admission.close()
    for number in [*waiting, crowd.come()]:
        with pytest.raises(ClosedError):
            await within(crowd.tasks[number])
    assert list(crowd.held) == [running]
    crowd.tasks[running].cancel()


class Crowd:
    """Requests that hold their slots until a test releases them."""

    def __init__(self, capacity: int, max_waiting: int = 100) -> None:
        self.capacity = capacity
        self.admission = Admission(capacity, max_waiting)
        self.order: list[int] = []
        self.held: dict[int, int] = {}
        self.overtaken: list[tuple[int, int]] = []
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self._leave: dict[int, asyncio.Event] = {}

    def come(self, weight: int = 1) -> int:
        number = len(self.tasks)
        self._leave[number] = asyncio.Event()
        self.tasks[number] = asyncio.create_task(self._request(number, weight))
        return number

    async def _request(self, number: int, weight: int) -> None:
        async with self.admission.slots(weight):
            self.order.append(number)
            self.held[number] = max(1, min(weight, self.capacity))
            assert sum(self.held.values()) <= self.capacity
            try:
                await self._check_turn(number)
                await self._leave[number].wait()
            finally:
                del self.held[number]

    async def _check_turn(self, number: int) -> None:
        """Check that all earlier requests have been admitted."""
        passed = [other for other, task in self.tasks.items() if other < number and not task.done()]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for other in passed:
            if other not in self.order and not self.tasks[other].done():
                self.overtaken.append((other, number))

    def go(self, number: int) -> None:
        self._leave[number].set()

    async def end(self) -> None:
        """All leave; then every slot is free."""
        for number in self.tasks:
            self.go(number)
        await within(asyncio.gather(*self.tasks.values(), return_exceptions=True))
        async with asyncio.timeout(LIMIT), self.admission.slots(self.capacity):
            assert self.held == {}


@asynccontextmanager
async def crowd_of(capacity: int, max_waiting: int = 100) -> AsyncIterator[Crowd]:
    crowd = Crowd(capacity, max_waiting)
    try:
        yield crowd
    finally:
        await crowd.end()


async def settle() -> None:
    """Let all pending callbacks run."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.promise("P8")
async def test_slots_are_granted_in_order_of_arrival() -> None:
    async with crowd_of(2) as crowd:
        for _ in range(6):
            crowd.come()
        await settle()
        assert crowd.order == [0, 1]
        for number in (1, 0, 2, 3):
            crowd.go(number)
            await settle()
        assert crowd.order == [0, 1, 2, 3, 4, 5]


async def test_request_occupies_as_many_slots_as_its_weight() -> None:
    async with crowd_of(4) as crowd:
        heavy, big, small = crowd.come(3), crowd.come(2), crowd.come(1)
        await settle()
        assert crowd.order == [heavy], "the small one fits, but it came after the big one"
        crowd.go(heavy)
        await settle()
        assert crowd.order == [heavy, big, small]
        whole = crowd.come(1000)
        crowd.go(big)
        await settle()
        assert whole not in crowd.order
        crowd.go(small)
        await settle()
        assert crowd.held == {whole: 4}, "more than there are means all of them"


async def test_capacity_is_at_least_one_slot() -> None:
    async with crowd_of(1) as crowd:
        crowd.come(0)
        crowd.come(-3)
        await settle()
        assert crowd.order == [0]


@pytest.mark.promise("P8")
async def test_request_beyond_max_queue_is_rejected() -> None:
    async with crowd_of(1, 2) as crowd:
        for _ in range(3):
            crowd.come()
        await settle()
        refused = crowd.come()
        with pytest.raises(UnavailableError, match=r"2 requests wait already \(engine\.max_queue"):
            await within(crowd.tasks[refused])
        crowd.go(0)
        await settle()
        accepted = crowd.come()
        await settle()
        assert not crowd.tasks[accepted].done()


async def test_queue_of_zero_rejects_requests_that_would_wait() -> None:
    async with crowd_of(1, 0) as crowd:
        crowd.come()
        await settle()
        with pytest.raises(UnavailableError):
            await within(crowd.tasks[crowd.come()])


@pytest.mark.promise("F23", "P8")
async def test_cancelled_request_leaves_the_queue_at_once() -> None:
    """It no longer counts as waiting."""
    async with crowd_of(1, 1) as crowd:
        crowd.come()
        waiting = crowd.come()
        await settle()
        crowd.tasks[waiting].cancel()
        next_one = crowd.come()  # before the cancelled one has even noticed
        await settle()
        assert not crowd.tasks[next_one].done()


async def test_cancelled_large_request_lets_small_ones_in() -> None:
    async with crowd_of(4) as crowd:
        crowd.come(3)
        big, small = crowd.come(4), crowd.come(1)
        await settle()
        assert small not in crowd.order
        crowd.tasks[big].cancel()
        await settle()
        assert small in crowd.order


@pytest.mark.parametrize("first", ["cancelled", "granted"])
async def test_request_cancelled_at_its_grant_frees_the_slot(first: str) -> None:
    async with crowd_of(1) as crowd:
        holder, unlucky, next_one = crowd.come(), crowd.come(), crowd.come()
        await settle()
        if first == "cancelled":
            crowd.tasks[unlucky].cancel()
        crowd.go(holder)
        await asyncio.sleep(0)  # the holder passes its slot on, which is not taken yet
        crowd.tasks[unlucky].cancel()
        await settle()
        assert crowd.tasks[unlucky].cancelled()
        assert crowd.order == [holder, next_one]


async def test_requests_cancelled_together_free_all_slots() -> None:
    async with crowd_of(3) as crowd:
        holder = crowd.come(3)
        leaving = [crowd.come(1 + number % 3) for number in range(50)]
        last = crowd.come()
        await settle()
        for number in leaving:
            crowd.tasks[number].cancel()
        crowd.go(holder)
        await settle()
        assert crowd.order == [holder, last]


@pytest.mark.promise("F24")
async def test_error_inside_the_block_frees_the_slots() -> None:
    admission = Admission(2, 0)
    with pytest.raises(ZeroDivisionError):
        async with admission.slots(2):
            raise ZeroDivisionError
    async with admission.slots(2):
        pass


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.integers(0, 6)),
        st.tuples(st.sampled_from(["go", "cancel"]), st.integers(0, 1000)),
        st.tuples(st.just("wait"), st.integers(1, 4)),
    ),
    max_size=60,
)


@pytest.mark.promise("P8")
@given(capacity=st.integers(1, 5), max_waiting=st.integers(0, 8), steps=STEPS)
def test_any_sequence_keeps_order_and_capacity(capacity: int, max_waiting: int, steps: list[tuple[str, int]]) -> None:
    """Never more slots than the capacity, in order of arrival, and every request is admitted or rejected."""

    async def play() -> None:
        async with crowd_of(capacity, max_waiting) as crowd:
            for action, value in steps:
                if action == "come":
                    crowd.come(value)
                elif action == "wait":
                    for _ in range(value):
                        await asyncio.sleep(0)
                elif crowd.tasks:
                    number = value % len(crowd.tasks)
                    crowd.go(number) if action == "go" else crowd.tasks[number].cancel()
            await settle()
            free = crowd.capacity - sum(crowd.held.values())
            idle = [number for number, task in crowd.tasks.items() if not task.done() and number not in crowd.held]
            assert free < capacity or not idle, "slots are free while a request waits"
        assert crowd.overtaken == []
        for task in crowd.tasks.values():
            assert task.cancelled() or task.exception() is None or isinstance(task.exception(), UnavailableError)

    asyncio.run(play())
