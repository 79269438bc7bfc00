"""What is measured, and how: one function a round for each group of rows.

Every function measures direct and plugin one right after the other, so that both see the same machine.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from benchmarks.dialects import SENT
from benchmarks.results import DIRECT, PLUGIN, Row
from benchmarks.targets import COMMAND, EMBEDDER
from engine_plugin.host import launch
from engine_plugin.host.handshake import plugin_environment
from engine_plugin.host.process import PluginProcess

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.results import Results
    from benchmarks.targets import Measured, Rig

__all__ = ["Sizes", "memory", "real_round", "start_round", "synthetic_round"]

REAL = "llama.cpp, tiny sample model"
STAND_IN = "stand-in engine"
START = "the plugin's process"

_MIB = 1024 * 1024
_START_TIMEOUT = 30.0


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


@dataclass(slots=True)
class Received:
    """What one stream brought. `first` is seconds to its first block, `delays` each paced event's way in ms."""

    first: float
    blocks: int
    events: int
    delays: list[float]


async def receive(target: Measured, body: bytes) -> Received:
    """Read one stream to its end. Raises RuntimeError when it was not complete."""
    received = Received(0.0, 0, 0, [])
    last = b""
    began = time.perf_counter()
    async with target.stream(body) as blocks:
        async for block in blocks:
            if not received.blocks:
                received.first = time.perf_counter() - began
            now = time.monotonic_ns()
            received.blocks += 1
            received.events += block.count(target.dialect.token)
            received.delays += [(now - int(sent)) / 1e6 for sent in SENT.findall(block)]
            last = block
    if target.dialect.end not in last:
        raise RuntimeError(f"{target.name}: a stream ended early")
    return received


async def streams(target: Measured, bodies: Sequence[bytes]) -> tuple[float, list[Received]]:
    """Read streams side by side; the seconds that all took, and what they brought."""
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(receive(target, body)) for body in bodies]
    return time.perf_counter() - began, [task.result() for task in tasks]


async def latencies(target: Measured, service: str, body: bytes, calls: int) -> list[float]:
    """Milliseconds of calls one after the other, after one that does not count."""
    found = []
    for _ in range(calls + 1):
        began = time.perf_counter()
        await target.call(service, body)
        found.append((time.perf_counter() - began) * 1000)
    return found[1:]


async def requests_per_second(target: Measured, body: bytes, width: int, calls: int) -> float:
    """`width` callers that call without a pause, until `calls` were made."""
    left = iter(range(calls))

    async def caller() -> None:
        for _ in left:
            await target.call("chat", body)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(caller())
    return calls / (time.perf_counter() - began)


def processor_seconds(pid: int | None) -> float:
    """The processor time that a process has used."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def real_round(results: Results, rig: Rig, sizes: Sizes) -> None:
    """One round against llama.cpp itself."""
    embedding = json.dumps({"model": EMBEDDER, "input": "Tell me a story."}).encode()
    add = results.add
    for target in rig.targets(results.rounds):
        one = target.chat(1)
        row = Row(REAL, "chat of 1 token", "ms", "added")
        add(row, target.name, await latencies(target, "chat", one, sizes.calls))
        if target.name == DIRECT:
            whole = await latencies(target, "chat", target.chat(1, stream=False), sizes.calls)
            add(Row(REAL, "the same, asked for as one answer", "ms"), target.name, whole)
        row = Row(REAL, "first token of a stream", "ms", "added")
        firsts = [(await receive(target, target.chat(8))).first * 1000 for _ in range(sizes.calls)]
        add(row, target.name, firsts)
        row = Row(REAL, "embed", "ms", "added")
        add(row, target.name, await latencies(target, "embed", embedding, sizes.calls))
        row = Row(REAL, "requests/s, 16 callers, chat of 1 token", "1/s", "ratio")
        add(row, target.name, [await requests_per_second(target, one, 16, sizes.concurrent_calls)])
    for count in (1, 4, 16):
        tokens = max(8, sizes.real_tokens // min(count, 4))
        for target in rig.targets(results.rounds):
            seconds, received = await streams(target, [target.chat(tokens)] * count)
            row = Row(REAL, f"tokens/s, {_parallel(count)}", "1/s", "ratio")
            results.add(row, target.name, [count * tokens / seconds])
            results.add(Row(REAL, f"events a message, {_parallel(count)}", ""), target.name, [_coalesced(received)])


async def synthetic_round(results: Results, rig: Rig, sizes: Sizes, group: str = STAND_IN) -> None:
    """One round against a stand-in."""
    add = results.add
    for target in rig.targets(results.rounds):
        one = target.chat(1)
        row = Row(group, "chat of 1 token", "ms", "added")
        add(row, target.name, await latencies(target, "chat", one, sizes.calls))
        row = Row(group, "first token of a stream", "ms", "added")
        firsts = [(await receive(target, target.chat(8))).first * 1000 for _ in range(sizes.calls)]
        add(row, target.name, firsts)
        row = Row(group, "requests/s, 16 callers, chat of 1 token", "1/s", "ratio")
        add(row, target.name, [await requests_per_second(target, one, 16, sizes.concurrent_calls)])
    row = Row(group, "an rpc that does nothing (GetOperateStatus)", "ms")
    add(row, PLUGIN, await _empty_calls(rig, sizes.calls))
    for count in (1, 16, 64):
        tokens = max(8, sizes.synthetic_tokens * min(count, 4) // count)
        for target in rig.targets(results.rounds):
            used = processor_seconds(rig.client.pid)
            seconds, received = await streams(target, [target.chat(tokens)] * count)
            used = processor_seconds(rig.client.pid) - used
            row = Row(group, f"1000 tokens/s, {_parallel(count)}", "1000/s", "ratio")
            add(row, target.name, [count * tokens / seconds / 1000])
            if target.name == PLUGIN:
                row = Row(group, f"events a message, {_parallel(count)}", "")
                add(row, PLUGIN, [_coalesced(received)])
                row = Row(group, f"plugin's processor seconds a million tokens, {_parallel(count)}", "s")
                add(row, PLUGIN, [used / (count * tokens) * 1e6])
    await _paced(results, rig, sizes.paced_tokens, group)


async def _paced(results: Results, rig: Rig, tokens: int, group: str) -> None:
    """64 streams with a token every 20 ms each, evenly spaced: the latency of a token without congestion."""
    count, interval = 64, 20
    paces = [{"interval_ms": interval, "delay_ms": n * interval / count} for n in range(count)]
    for target in rig.targets(results.rounds):
        used = processor_seconds(rig.client.pid)
        seconds, received = await streams(target, [target.chat(tokens, pace=pace) for pace in paces])
        used = processor_seconds(rig.client.pid) - used
        row = Row(group, "a token's way, 64 streams, one each 20 ms", "ms", "added")
        results.add(row, target.name, [delay for one in received for delay in one.delays])
        if target.name == PLUGIN:
            row = Row(group, "plugin's share of one core meanwhile", "%")
            results.add(row, PLUGIN, [100 * used / seconds])


async def _empty_calls(rig: Rig, calls: int) -> list[float]:
    found = []
    for _ in range(calls + 1):
        began = time.perf_counter()
        await rig.client.get_operate_status()
        found.append((time.perf_counter() - began) * 1000)
    return found[1:]


def _coalesced(received: list[Received]) -> float:
    return sum(one.events for one in received) / sum(one.blocks for one in received)


def _parallel(count: int) -> str:
    return f"{count} streams" if count > 1 else "1 stream"


async def start_round(results: Results, folder: Path, sizes: Sizes) -> None:
    """Start plugins in `folder`, which holds a plugin.yaml; nothing is left of them."""

    def took(title: str) -> None:
        results.add(Row(START, title, "ms"), PLUGIN, [(time.perf_counter() - began) * 1000])

    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "pass")
    await process.wait()
    took("Python alone: start to exit")

    began = time.perf_counter()
    environ = plugin_environment()
    plugin = await PluginProcess.spawn("plugin", COMMAND, cwd=folder, env=environ, on_log=None)
    try:
        async with asyncio.timeout(_START_TIMEOUT):
            await plugin.handshake()
        took("start to handshake")
    finally:
        psutil.Process(plugin.pid).terminate()  # there is no connection to ask it over; it removes its socket
        await plugin.end(2)

    began = time.perf_counter()
    async with await launch(COMMAND, name="plugin", cwd=folder, start_timeout=_START_TIMEOUT) as client:
        await client.get_manifest()
        results.add(
            Row(START, "start to the first rpc's answer", "ms"), PLUGIN, [(time.perf_counter() - began) * 1000]
        )
        results.add(Row(START, "memory (RSS) when started", "MiB"), PLUGIN, [resident(client.pid)])
        if sys.platform == "linux":
            await asyncio.sleep(sizes.idle_seconds)  # what the start began is over by then
            before = _wakeups(client.pid)
            await asyncio.sleep(sizes.idle_seconds)
            woken = (_wakeups(client.pid) - before) / sizes.idle_seconds
            results.add(Row(START, "wake-ups a second when idle", "1/s"), PLUGIN, [woken])


def memory(results: Results, real: Rig, synthetic: Rig) -> None:
    """The plugins' memory at the end of a run."""
    row = Row(START, "memory (RSS) after the run against llama.cpp", "MiB")
    results.add(row, PLUGIN, [resident(real.client.pid)])
    row = Row(START, "memory (RSS) after the run against the stand-in", "MiB")
    results.add(row, PLUGIN, [resident(synthetic.client.pid)])


def resident(pid: int | None) -> float:
    """A process's resident memory in MiB."""
    return psutil.Process(pid).memory_info().rss / _MIB


def _wakeups(pid: int | None) -> int:
    """How often the process's threads were woken so far. Linux."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status.read_text(), re.MULTILINE)
        total += int(found.group(1)) if found else 0
    return total
