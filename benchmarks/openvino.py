"""OpenVINO, three ways: its pipeline in a process, the embedded server's HTTP, and the plugin's gRPC.

The ways have the same model, options and threads, a process of their own each, and work one at a time. Every round
measures all three one right after the other, each time in another order, and compares them with one another.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.embedded import MODEL, SERVER, embedded_server
from benchmarks.helpers import Helper, helper
from benchmarks.results import PLUGIN, Row, quantile
from benchmarks.targets import COMMAND, Plugged, write_plugin
from engine_plugin.engines.sse import DONE
from engine_plugin.host import launch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from benchmarks.results import Results
    from benchmarks.targets import Target

__all__ = ["IN_PROCESS", "Lineup", "lineup", "openvino_round", "tokens_for"]

IN_PROCESS = "in-process"
WIDTHS = (1, 8, 32)
# What graph.pbtxt tells the server, and the baseline's SchedulerConfig alike.
SCHEDULER = {
    "max_num_batched_tokens": 256,
    "cache_size": 1,
    "max_num_seqs": 256,
    "dynamic_split_fuse": True,
    "enable_prefix_caching": True,
}
_PAIRS = ((IN_PROCESS, SERVER), (SERVER, PLUGIN))
_START_TIMEOUT = 60.0
_HEALTH_PATH = "/v2/health/ready"
_TEXT = re.compile(rb'"content": ?"[^"]')
_COUNTED = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass(frozen=True, slots=True)
class Taken:
    """What some streams took: seconds for all, and seconds to the first text of each."""

    seconds: float
    first: list[float]
    tokens: int


class Way(Protocol):
    """One way to the model."""

    name: str

    async def generate(self, prompts: Sequence[str], tokens: int) -> Taken:
        """Answer all prompts side by side, each with exactly that many tokens."""


class InProcess:
    """`benchmarks.genai` in a process of its own."""

    name = IN_PROCESS

    def __init__(self, program: Helper) -> None:
        self._program = program

    async def generate(self, prompts: Sequence[str], tokens: int) -> Taken:
        await self._program.tell({"prompts": list(prompts), "tokens": tokens})
        return Taken(**await self._program.answer())


class Streamed:
    """The server or the plugin, whose answers are streams of events."""

    def __init__(self, target: Target, model: str) -> None:
        self.name = target.name
        self._target = target
        self._model = model

    async def generate(self, prompts: Sequence[str], tokens: int) -> Taken:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._receive(prompt, tokens)) for prompt in prompts]
        seconds = time.perf_counter() - began
        received = [task.result() for task in tasks]
        return Taken(seconds, [first for first, _ in received], sum(counted for _, counted in received))

    async def _receive(self, prompt: str, tokens: int) -> tuple[float, int]:
        """Read one stream to its end: seconds to the first text, and tokens. RuntimeError when not complete."""
        first, last = 0.0, b""
        body = _request(self._model, prompt, tokens)
        began = time.perf_counter()
        async with self._target.stream(body) as blocks:
            async for block in blocks:
                if not first and _TEXT.search(block):
                    first = time.perf_counter() - began
                last = (last + block)[-4096:]
        counted = _COUNTED.search(last)
        if DONE not in last or counted is None or not first:
            raise RuntimeError(f"{self.name}: a stream ended early, without text or without its usage: {last!r}")
        return first, int(counted.group(1))


def _request(model: str, prompt: str, tokens: int) -> bytes:
    shape = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(shape).encode()


@dataclass(frozen=True, slots=True)
class Lineup:
    """All ways, ready, and who asks the server for its health."""

    ways: tuple[Way, ...]
    prober: Helper
    version: str

    def turned(self, turn: int) -> tuple[Way, ...]:
        """The ways, another one first each time."""
        at = turn % len(self.ways)
        return self.ways[at:] + self.ways[:at]


@asynccontextmanager
async def lineup(folder: Path, sockets: Path, model: Path, threads: int) -> AsyncIterator[Lineup]:
    """All three ways to a chat model in OpenVINO's format. Ends all processes when left."""
    async with AsyncExitStack() as cleanup:
        program = await cleanup.enter_async_context(helper("benchmarks.genai"))
        await program.tell({"model": str(model), "threads": threads, "scheduler": SCHEDULER})
        version = (await program.answer())["version"]
        server = await cleanup.enter_async_context(
            embedded_server(folder / "server", sockets, model, threads, SCHEDULER)
        )
        prober = await cleanup.enter_async_context(helper("benchmarks.prober", server.address, _HEALTH_PATH))
        plugged = await _plugged(cleanup, folder / "plugin", model, threads)
        yield Lineup((InProcess(program), Streamed(server, MODEL), plugged), prober, version)


async def _plugged(cleanup: AsyncExitStack, folder: Path, model: Path, threads: int) -> Streamed:
    """The plugin with the embedded server behind it, the model pulled and loaded."""
    options: dict[str, Any] = {"name": "openvino", "backend": "embedded", "threads": threads, "chat": SCHEDULER}
    write_plugin(folder, options)
    client = await launch(COMMAND, name="plugin", cwd=folder, start_timeout=_START_TIMEOUT)
    await cleanup.enter_async_context(client)
    await client.start_engine()
    await client.pull_model(str(model))
    await client.load_model(model.name)
    return Streamed(Plugged(client), model.name)


async def tokens_for(way: Way, seconds: float) -> dict[int, int]:
    """By the number of streams: how many tokens each should have, so that all together take about so many seconds."""
    found = {}
    for width in WIDTHS:
        await way.generate(_prompts(width), 8)
        taken = await way.generate(_prompts(width), 32)
        found[width] = max(16, min(512, int(32 * seconds / taken.seconds)))
    return found


def _prompts(width: int) -> list[str]:
    return [f"Tell me a story about the number {number}." for number in range(width)]


async def openvino_round(results: Results, line: Lineup, tokens: dict[int, int], calls: int, name: str) -> None:
    """One round; `name` is the model's in the table."""
    for way in line.turned(results.rounds):
        firsts = [(await way.generate(_prompts(1), 2)).first[0] * 1000 for _ in range(calls + 1)][1:]
        _add_spread(results, name, "first token, 1 stream", way.name, firsts)
    for width in WIDTHS:
        label = f"{width} streams" if width > 1 else "1 stream"
        for way in line.turned(results.rounds):
            health: list[float] = []
            taken = await _with_health(line.prober, way, width, tokens[width], health)
            _add(results, name, f"tokens/s, {label}", "1/s", "ratio", way.name, [taken.tokens / taken.seconds])
            if width > 1:
                _add_spread(results, name, f"first token, {label}", way.name, [one * 1000 for one in taken.first])
            if health and width == max(WIDTHS):
                for title, share in (("median", 0.5), ("p99", 0.99)):
                    row = Row(_group(name, _PAIRS[0]), f"{_HEALTH_PATH}, {label}, {title}", "ms", ways=_PAIRS[0])
                    results.add(row, SERVER, [quantile(sorted(health), share)])


async def _with_health(prober: Helper, way: Way, width: int, tokens: int, health: list[float]) -> Taken:
    """Generate, with the server asked for its health meanwhile when it is the server's turn and the widest one."""
    if way.name != SERVER or width != max(WIDTHS):
        return await way.generate(_prompts(width), tokens)
    await prober.tell("begin")
    try:
        return await way.generate(_prompts(width), tokens)
    finally:
        await prober.tell("end")
        health += await prober.answer()


def _add_spread(results: Results, name: str, title: str, way: str, values: list[float]) -> None:
    """The median and the p99 of one round."""
    ordered = sorted(values)
    _add(results, name, f"{title}, median", "ms", "added", way, [quantile(ordered, 0.5)])
    _add(results, name, f"{title}, p99", "ms", "added", way, [quantile(ordered, 0.99)])


def _add(results: Results, name: str, title: str, unit: str, compare: str, way: str, values: list[float]) -> None:
    """To each group that has the way: what is one's second way is the next one's first."""
    for ways in _PAIRS:
        if way in ways:
            results.add(Row(_group(name, ways), title, unit, compare, ways), way, values)


def _group(name: str, ways: tuple[str, str]) -> str:
    return f"OpenVINO, {name}: {ways[0]} and {ways[1]}"
