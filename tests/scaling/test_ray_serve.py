"""A plugin that points at Ray Serve: models found, replicas shared, streams passed on, left work stopped."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.conftest import REPORT
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from engine_plugin.plugin import Plugin

WORDS = 50

pytestmark = pytest.mark.slow


def ask(words: int = WORDS) -> bytes:
    return json.dumps(
        {"messages": [{"role": "user", "content": "one two"}], "max_tokens": words, "stream": True}
    ).encode()


def events(chunk: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix(b"data: ") for line in chunk.split(b"\n\n") if line]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


async def first_event(chunks: AsyncIterator[bytes]) -> dict[str, Any]:
    return events(await anext(chunks))[0]


async def streamed(plugin: Plugin, words: int = WORDS) -> tuple[str, list[dict[str, Any]]]:
    """The replica that answered, and its events."""
    found: list[dict[str, Any]] = []
    async with plugin.stream("chat", ask(words)) as chunks:
        async for chunk in chunks:
            found += events(chunk)
    [replica] = {event["system_fingerprint"] for event in found}
    return str(replica), found


async def test_models_are_found_and_a_chat_needs_none(plugin: Plugin) -> None:
    async with asyncio.timeout(LIMIT):
        assert [model.name for model in await plugin.list_models()] == ["echo"]
        asked = {"messages": [{"role": "user", "content": "one two"}], "max_tokens": 3}
        answer = json.loads(await plugin.invoke("chat", json.dumps(asked).encode()))
    assert answer["choices"][0]["message"]["content"] == "one two one "
    assert answer["usage"]["completion_tokens"] == 3


async def test_a_stream_is_passed_on_word_by_word(plugin: Plugin) -> None:
    async with asyncio.timeout(LIMIT):
        _, found = await streamed(plugin)
    assert [event["choices"][0]["delta"]["content"] for event in found] == ["one ", "two "] * (WORDS // 2)
    assert found[-1]["choices"][0]["finish_reason"] == "length"


async def test_both_replicas_answer_at_the_same_time(plugin: Plugin) -> None:
    """Each has room for one request, so that two which overlap are on two replicas."""
    async with (
        asyncio.timeout(LIMIT),
        plugin.stream("chat", ask(100_000)) as one,
        plugin.stream("chat", ask(100_000)) as other,
    ):
        ahead, beside = await first_event(one), await first_event(other)
        assert ahead["system_fingerprint"] != beside["system_fingerprint"]


async def test_leaving_a_stream_frees_its_replica(plugin: Plugin) -> None:
    """Both replicas are taken for good, so that only a cancelled one can answer the third request."""
    async with asyncio.timeout(LIMIT), plugin.stream("chat", ask(1_000_000)) as staying:
        kept = await first_event(staying)
        async with plugin.stream("chat", ask(1_000_000)) as leaving:
            left = await first_event(leaving)
        replica, _ = await streamed(plugin, 2)
        assert replica == left["system_fingerprint"] != kept["system_fingerprint"]
        assert await anext(staying)


async def test_what_a_cluster_costs(plugin: Plugin, cluster: str, request: pytest.FixtureRequest) -> None:
    """Figures for docs/scaling.md; that all are answered, by both, is what is asserted."""
    async with asyncio.timeout(LIMIT):
        await streamed(plugin, 2)
        alone = await _timed(streamed(plugin))
        began = time.perf_counter()
        replicas = {replica for replica, _ in await asyncio.gather(*(streamed(plugin) for _ in range(8)))}
        eight = time.perf_counter() - began
        through = sorted([await _timed(streamed(plugin, 1)) for _ in range(30)])
        async with httpx.AsyncClient(trust_env=False) as client:
            direct = sorted([await _timed(_asked(client, cluster)) for _ in range(30)])
        after = sorted([await _after_leaving_two(plugin) for _ in range(10)])
    assert len(replicas) == 2
    request.config.stash[REPORT] += [
        f"Ray Serve, {WORDS} words of 5 ms: one chat {alone:.2f} s, eight at once on two replicas {eight:.2f} s",
        f"one word: through the plugin {through[15] * 1000:.1f} ms, straight to Ray Serve {direct[15] * 1000:.1f} ms",
        f"one word after two streams were left: {after[5] * 1000:.1f} ms",
    ]


async def _after_leaving_two(plugin: Plugin) -> float:
    """How long a chat of one word takes when all replicas were taken a moment ago."""
    async with plugin.stream("chat", ask(100_000)) as one, plugin.stream("chat", ask(100_000)) as other:
        await asyncio.gather(first_event(one), first_event(other))
    return await _timed(streamed(plugin, 1))


async def _timed(work: Any) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


async def _asked(client: httpx.AsyncClient, cluster: str) -> None:
    async with client.stream("POST", f"{cluster}/v1/chat/completions", content=ask(1)) as answer:
        assert answer.status_code == 200
        assert [event async for event in answer.aiter_lines()]
