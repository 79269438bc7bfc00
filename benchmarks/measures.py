"""What streams and calls bring and take; the rounds of `benchmarks.rounds` are made of these."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from benchmarks.dialects import TOKEN
from engine_plugin.errors import EnginePluginError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.targets import Measured

__all__ = [
    "Received",
    "Sizes",
    "calls_per_second",
    "latencies",
    "milliseconds",
    "processor_seconds",
    "receive",
    "resident",
    "streams",
    "threads",
    "wakeups",
]

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much one round does. `tokens` are those of a stream at 1 stream; parallel ones share about as many."""

    calls: int
    concurrent_calls: int
    real_tokens: int
    synthetic_tokens: int
    paced_tokens: int
    idle_seconds: float
    streaming_seconds: float
    """About how long OpenVINO's streams run."""
    pulled: int
    """MiB of the pulled model."""
    messages: tuple[int, ...]
    """MiB of the long requests and answers."""


@dataclass(slots=True)
class Received:
    """What one stream brought: its blocks, and when each came (nanoseconds). `first` is seconds to the first."""

    first: float
    blocks: list[bytes]
    times: list[int]

    def delays(self) -> list[float]:
        """The milliseconds that each paced token was under way."""
        return [
            (came - int(sent)) / 1e6
            for came, block in zip(self.times, self.blocks, strict=True)
            for _, sent in TOKEN.findall(block)
        ]

    def ended(self, end: bytes) -> bool:
        """Whether the last block has what a whole stream ends with."""
        return any(end in block for block in self.blocks[-1:])

    def is_whole(self, tokens: int, end: bytes) -> bool:
        """Whether a stand-in's tokens are all there, in their order, and the end."""
        numbers = [int(number) for number, _ in TOKEN.findall(b"".join(self.blocks))]
        return numbers == list(range(tokens)) and self.ended(end)


async def receive(target: Measured, body: bytes) -> Received:
    """Read one stream to its end. One that breaks off is not whole."""
    received = Received(0.0, [], [])
    began = time.perf_counter()
    with contextlib.suppress(EnginePluginError):
        async with target.stream(body) as blocks:
            async for block in blocks:
                received.times.append(time.monotonic_ns())
                received.blocks.append(block)
                if len(received.blocks) == 1:
                    received.first = time.perf_counter() - began
    return received


async def streams(target: Measured, body: bytes, width: int) -> tuple[float, list[Received]]:
    """Read `width` streams side by side; the seconds that all took, and what they brought."""
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(receive(target, body)) for _ in range(width)]
    return time.perf_counter() - began, [task.result() for task in tasks]


async def milliseconds(call: Callable[[], Awaitable[object]], times: int) -> list[float]:
    """What calls take, one after the other."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        await call()
        found.append((time.perf_counter() - began) * 1000)
    return found


async def latencies(call: Callable[[], Awaitable[object]], calls: int) -> list[float]:
    """Milliseconds of calls one after the other, after one that does not count."""
    await call()
    return await milliseconds(call, calls)


async def calls_per_second(call: Callable[[], Awaitable[object]], width: int, calls: int) -> float:
    """`width` callers that call without a pause, until `calls` were made."""
    left = iter(range(calls))

    async def caller() -> None:
        for _ in left:
            await call()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(caller())
    return calls / (time.perf_counter() - began)


def processor_seconds(pid: int | None) -> float:
    """The processor time that a process has used; on Linux that of its present threads, in nanoseconds."""
    if sys.platform == "linux":
        stats = Path(f"/proc/{pid}/task").glob("*/schedstat")
        return sum(int(stat.read_text().split()[0]) for stat in stats) / 1e9
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def resident(pid: int | None) -> float:
    """A process's resident memory in MiB."""
    return psutil.Process(pid).memory_info().rss / _MIB


def threads(pid: int | None) -> int:
    """A process's threads."""
    return psutil.Process(pid).num_threads()


def wakeups(pid: int | None) -> int:
    """How often the process's threads were woken so far. Linux."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status.read_text(), re.MULTILINE)
        total += int(found.group(1)) if found else 0
    return total
