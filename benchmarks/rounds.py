"""One round for each kind of engine. Every function measures all ways one right after the other."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.measures import (
    calls_per_second,
    latencies,
    milliseconds,
    processor_seconds,
    receive,
    resident,
    streams,
)
from benchmarks.results import DIRECT, Row
from benchmarks.targets import Plugged
from engine_plugin.errors import EnginePluginError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.measures import Received, Sizes
    from benchmarks.results import Results
    from benchmarks.targets import Measured, Rig

__all__ = ["FAULTY", "REAL", "STAND_IN", "calls_round", "memory", "real_round", "streams_round"]

REAL = "llama.cpp, tiny sample model"
STAND_IN = "stand-in engine"
FAULTY = "streams that lost or reordered anything"

_MIB = 1024 * 1024
_WIDTHS = (1, 16, 64, 256)
_CALLERS = (16, 64)
_BATCHES = (1, 32, 256)
_PACED = 64
_INTERVAL = 20.0
_LONG_EVERY = 4
"""Rounds from one with the longest messages to the next."""


async def real_round(results: Results, rig: Rig, sizes: Sizes) -> None:
    """One round against llama.cpp itself."""
    add, row = results.add, partial(Row, REAL, ways=rig.ways)
    embedding = _embedding(rig.embedder, 1)
    for target in rig.targets(results.rounds):
        one = partial(target.call, "chat", target.chat(1))
        add(row("chat of 1 token", "ms", "added"), target.name, await latencies(one, sizes.calls))
        if target.name == DIRECT:
            whole = await latencies(partial(target.call, "chat", target.chat(1, stream=False)), sizes.calls)
            add(row("the same, asked for as one answer", "ms"), target.name, whole)
        add(row("first token of a stream", "ms", "added"), target.name, await _firsts(target, sizes.calls))
        embeds = await latencies(partial(target.call, "embed", embedding), sizes.calls)
        add(row("embed", "ms", "added"), target.name, embeds)
        rate = await calls_per_second(one, 16, sizes.concurrent_calls)
        add(row("requests/s, 16 callers, chat of 1 token", "1/s", "rate"), target.name, [rate])
    for count in (1, 4, 16):
        tokens = max(8, sizes.real_tokens // min(count, 4))
        for target in rig.targets(results.rounds):
            seconds, received = await streams(target, target.chat(tokens), count)
            if not all(one.ended(target.dialect.end) for one in received):
                raise RuntimeError(f"{target.name}: a stream ended early")
            rate = count * tokens / seconds
            add(row(f"tokens/s, {_parallel(count)}", "1/s", "rate"), target.name, [rate])
            add(row(f"events a message, {_parallel(count)}", ""), target.name, [_coalesced(target, received)])


async def calls_round(results: Results, rig: Rig, sizes: Sizes, group: str) -> None:
    """One round of calls against a stand-in: empty ones and chats; with an embedder embeds and long messages."""
    add, row = results.add, partial(Row, group, ways=rig.ways)
    for target in rig.targets(results.rounds):
        await _timed(results, row, target, "an empty rpc", target.nothing, sizes.calls)
        one = partial(target.call, "chat", target.chat(1))
        await _timed(results, row, target, "chat of 1 token", one, sizes.calls)
        for callers in _CALLERS:
            rate = await calls_per_second(one, callers, sizes.concurrent_calls)
            title = f"requests/s, {callers} callers, chat of 1 token"
            add(row(title, "1/s", "rate"), target.name, [rate])
    if rig.embedder:
        await _embeds(results, row, rig, sizes)
        await _long_messages(results, row, rig, sizes)


async def _timed(
    results: Results,
    row: partial[Row],
    target: Measured,
    title: str,
    call: Callable[[], Awaitable[object]],
    calls: int,
) -> None:
    """Add what a call takes, and the processor time of it in the host and in the plugin."""
    await call()
    host, used = time.process_time(), _used(target)
    results.add(row(title, "ms", "added"), target.name, await milliseconds(call, calls))
    host, used = time.process_time() - host, _used(target) - used
    results.add(row(f"{title}: host's processor time", "ms", "cost"), target.name, [host / calls * 1000])
    if isinstance(target, Plugged):
        results.add(row(f"{title}: plugin's processor time", "ms", "cost"), target.name, [used / calls * 1000])


async def _embeds(results: Results, row: partial[Row], rig: Rig, sizes: Sizes) -> None:
    for texts in _BATCHES:
        for target in rig.targets(results.rounds):
            took = latencies(partial(target.call, "embed", _embedding(rig.embedder, texts)), max(1, sizes.calls // 5))
            await _try(results, row(f"embed, batch of {texts}", "ms", "added"), target, took)


async def _long_messages(results: Results, row: partial[Row], rig: Rig, sizes: Sizes) -> None:
    for size in sizes.messages:
        if size > 1 and results.rounds % _LONG_EVERY != 1:
            continue
        for target in rig.targets(results.rounds):
            asked = target.chat(1, padding=" " * (size * _MIB - 512))
            took = milliseconds(partial(target.call, "chat", asked), 1)
            await _try(results, row(f"request of {size} MiB", "ms", "added"), target, took)
            told = target.chat(size * 16, length=_MIB // 16)
            took = milliseconds(partial(target.call, "chat", told), 1)
            await _try(results, row(f"answer of {size} MiB", "ms", "added"), target, took)


async def streams_round(results: Results, rig: Rig, sizes: Sizes, group: str) -> None:
    """One round of streams from a stand-in: to their first token, as fast as they come, and paced."""
    add, row = results.add, partial(Row, group, ways=rig.ways)
    for target in rig.targets(results.rounds):
        add(row("first token of a stream", "ms", "added"), target.name, await _firsts(target, sizes.calls))
    for count in _WIDTHS:
        tokens = max(8, sizes.synthetic_tokens * min(count, 2) // count)
        for target in rig.targets(results.rounds):
            used = _used(target)
            seconds, received = await streams(target, target.chat(tokens), count)
            used = _used(target) - used
            rate = count * tokens / seconds / 1000
            add(row(f"1000 tokens/s, {_parallel(count)}", "1000/s", "rate"), target.name, [rate])
            _add_faults(results, row, target, received, tokens)
            if isinstance(target, Plugged):
                title = f"events a message, {_parallel(count)}"
                add(row(title, ""), target.name, [_coalesced(target, received)])
                title = f"processor seconds a million tokens, {_parallel(count)}"
                add(row(title, "s", "cost"), target.name, [used / (count * tokens) * 1e6])
    for target in rig.targets(results.rounds):
        body = target.chat(sizes.paced_tokens, interval_ms=_INTERVAL, delay_ms=100)
        used = _used(target)
        seconds, received = await streams(target, body, _PACED)
        used = _used(target) - used
        delays = [delay for one in received for delay in one.delays()]
        title = f"a token's way, {_PACED} streams, one each {_INTERVAL:.0f} ms"
        add(row(title, "ms", "added"), target.name, delays)
        _add_faults(results, row, target, received, sizes.paced_tokens)
        if isinstance(target, Plugged):
            title = "plugin's share of one core meanwhile"
            add(row(title, "%", "cost"), target.name, [used / seconds * 100])


def memory(results: Results, rig: Rig, group: str) -> None:
    """The plugins' memory at the end of a run."""
    row = Row(group, "memory (RSS) after the run", "MiB", "cost", rig.ways)
    for plugin in rig.plugins:
        results.add(row, plugin.name, [resident(plugin.client.pid)])


async def _firsts(target: Measured, times: int) -> list[float]:
    """The milliseconds to the first tokens of streams, one after the other."""
    return [(await receive(target, target.chat(8))).first * 1000 for _ in range(times)]


async def _try(results: Results, row: Row, target: Measured, took: Awaitable[list[float]]) -> None:
    """Add the samples, or the reason why there are none."""
    try:
        results.add(row, target.name, await took)
    except EnginePluginError as error:
        results.refusals[row.title, target.name] = str(error)


def _add_faults(results: Results, row: partial[Row], target: Measured, received: list[Received], tokens: int) -> None:
    faults = sum(not one.is_whole(tokens, target.dialect.end) for one in received)
    results.add(row(FAULTY, "%"), target.name, [faults / len(received) * 100])


def _used(target: Measured) -> float:
    return processor_seconds(target.client.pid) if isinstance(target, Plugged) else 0.0


def _embedding(model: str, texts: int) -> bytes:
    said = ["Tell me a story."] * texts
    return json.dumps({"model": model, "input": said if texts > 1 else said[0]}).encode()


def _coalesced(target: Measured, received: list[Received]) -> float:
    events = sum(block.count(target.dialect.token) for one in received for block in one.blocks)
    return events / max(1, sum(len(one.blocks) for one in received))


def _parallel(count: int) -> str:
    return f"{count} streams" if count > 1 else "1 stream"
