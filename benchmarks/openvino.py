"""OpenVINO, three ways: its pipeline in a process, the embedded server's HTTP, and the plugin's gRPC.

The ways have the same model, options and threads, a process of their own each, and work one at a time. Every round
measures all one right after the other, each time in another order, and compares them with one another. The pipeline
is measured with OpenVINO's own TextStreamer, as a program would use it, and without text: that is all it could give.
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
from engine_plugin.host import launch
from engine_plugin.transport.sse import DONE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from benchmarks.results import Results
    from benchmarks.targets import Target

__all__ = ["IN_PROCESS", "Lineup", "Load", "lineup", "loads", "openvino_round"]

IN_PROCESS, TOKENS_ONLY = "in-process", "without text"
WIDTHS = (1, 8, 32)
# The model's options in the server, and the baseline's SchedulerConfig alike.
SCHEDULER = {
    "max_num_batched_tokens": 256,
    "cache_size": 1,
    "max_num_seqs": 256,
    "dynamic_split_fuse": True,
    "enable_prefix_caching": True,
}
_PAIRS = ((IN_PROCESS, SERVER), (TOKENS_ONLY, SERVER), (SERVER, PLUGIN))
_MOST_TOKENS = 512
_START_TIMEOUT = 60.0
_HEALTH_PATH = "/v2/health/ready"
_TEXT = re.compile(rb'"content": ?"[^"]')
_COUNTED = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass(frozen=True, slots=True)
class Taken:
    """What some streams took: seconds for all, and seconds to the first text of each; the tokens of all."""

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

    def __init__(self, program: Helper, name: str) -> None:
        self.name = name
        self._program = program

    async def generate(self, prompts: Sequence[str], tokens: int) -> Taken:
        await self._program.tell({"prompts": list(prompts), "tokens": tokens, "text": self.name == IN_PROCESS})
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
        baselines = InProcess(program, IN_PROCESS), InProcess(program, TOKENS_ONLY)
        yield Lineup((*baselines, Streamed(server, MODEL), plugged), prober, version)


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


@dataclass(frozen=True, slots=True)
class Load:
    """So many streams side by side, of so many tokens each; the whole of it so many times."""

    width: int
    tokens: int
    times: int = 1

    @property
    def label(self) -> str:
        return f"{self.width} streams" if self.width > 1 else "1 stream"

    async def on(self, way: Way) -> tuple[float, list[float]]:
        """Tokens a second, and the milliseconds to each first text."""
        prompts = [f"Tell me a story about the number {number}." for number in range(self.width)]
        taken = [await way.generate(prompts, self.tokens) for _ in range(self.times)]
        rate = sum(one.tokens for one in taken) / sum(one.seconds for one in taken)
        return rate, [first * 1000 for one in taken for first in one.first]


async def loads(way: Way, seconds: float) -> list[Load]:
    """One for each width, so that it takes this way about so many seconds."""
    found = []
    for width in WIDTHS:
        trial = Load(width, 32)
        await trial.on(way)
        rate, _ = await trial.on(way)
        each = int(rate * seconds / width)
        tokens = max(16, min(_MOST_TOKENS, each))
        found.append(Load(width, tokens, max(1, round(each / tokens))))
    return found


async def openvino_round(results: Results, line: Lineup, work: Sequence[Load], calls: int, name: str) -> None:
    """One round; `name` is the model's in the table."""
    alone = {}
    for way in line.turned(results.rounds):
        await Load(1, 2).on(way)
        _, alone[way.name] = await Load(1, 2, calls).on(way)
    for way in line.ways:
        _add_spread(results, name, "first token, 1 stream", way.name, alone[way.name])
    for load in work:
        done: dict[str, tuple[float, list[float]]] = {}
        health: list[float] = []
        for way in line.turned(results.rounds):
            if way.name == SERVER and load.width == max(WIDTHS):
                done[way.name], health = await _with_health(line.prober, way, load)
            else:
                done[way.name] = await load.on(way)
        for way in line.ways:
            rate, firsts = done[way.name]
            _add(results, name, f"tokens/s, {load.label}", "1/s", "rate", way.name, [rate])
            if load.width > 1:
                _add_spread(results, name, f"first token, {load.label}", way.name, firsts)
        for title, share in (("median", 0.5), ("p99", 0.99)) if health else ():
            row = Row(_group(name, _PAIRS[0]), f"{_HEALTH_PATH}, {load.label}, {title}", "ms", ways=_PAIRS[0])
            results.add(row, SERVER, [quantile(sorted(health), share)])


async def _with_health(prober: Helper, way: Way, load: Load) -> tuple[tuple[float, list[float]], list[float]]:
    """The load, and the milliseconds that the server's answers about its health take meanwhile."""
    await prober.tell("begin")
    try:
        done = await load.on(way)
    finally:
        await prober.tell("end")
        health = await prober.answer()
    return done, health


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
