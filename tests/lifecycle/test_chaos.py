"""Random calls, faults and deaths at once. Every call ends, and afterwards the plugin works.

The rounds are the same in every run. `CHAOS=50` runs so many random ones instead; a failing one names its number.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.engines.local import server
from engine_plugin.errors import EnginePluginError
from engine_plugin.transport import answers
from tests.fake_engine.program import TOKENS
from tests.patience import LIMIT, pace

from .world import EMBED, HELLO, words

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .world import Begin, World

pytestmark = pytest.mark.slow

MORE = int(os.environ.get("CHAOS", "0"))
ROUNDS = random.SystemRandom().sample(range(1 << 32), MORE) if MORE else [1, 2]
CALLERS, CALLS = 6, 20

FAULTS: list[dict[str, Any]] = [
    {"do": "status", "status": 503},
    {"do": "status", "status": 500},
    {"do": "hang", "after": 2},
    {"do": "hang"},
    {"do": "close"},
    {"do": "reset"},
    {"do": "garbage"},
    {"do": "truncated", "where": "chunk"},
    {"do": "die", "code": 1},
    {"do": "die", "after": 2, "signal": "SIGSEGV"},
    {"do": "block", "seconds": 0.3},
    {"do": "flood", "fd": 1, "mib": 1},
    {"do": "cut", "after": 1},
]
LIVES: list[dict[str, Any]] = [
    {},
    {},
    {"load_seconds": 0.1, "load_lines": 0.02},
    {"load_exit": {"code": 2, "lines": ["0.1 E no luck"]}},
    {"grandchild": "own"},
    {"grandchild": "same", "ignore_term": True},
    {"rules": [{"on": "probe", "do": "die", "code": 5}]},
    {"rules": [{"on": "health", "from": 4, "count": 6, "do": "hang"}]},
]


def life(dice: random.Random) -> dict[str, Any]:
    """Return the script of one process run with some faults."""
    rules = [
        {"on": dice.choice(["chat", "embed"]), "from": dice.randint(1, 6), "count": 1} | fault
        for fault in dice.sample(FAULTS, 3)
    ]
    base = dice.choice(LIVES)
    return base | {"rules": [*base.get("rules", ()), *rules]}


async def abandon(world: World) -> None:
    """Abandon a stream before its end."""
    async with world.client.stream("chat", HELLO | {"max_tokens": -1}, timeout=1) as chunks:
        await anext(chunks)


async def kill(world: World, number: int) -> None:
    """Kill or suspend the engine, if it runs."""
    for pid in world.processes()[:1]:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def calls(world: World) -> list[Callable[[], Awaitable[Any]]]:
    """Return what a caller may do, mostly requests."""
    client = world.client
    ask = [lambda: client.invoke("chat", HELLO, timeout=1), lambda: client.invoke("embed", EMBED, timeout=1)]
    rest: list[Callable[[], Awaitable[Any]]] = [
        lambda: abandon(world),
        lambda: client.load_model("tiny-chat-gguf"),
        lambda: client.unload_model("tiny-chat-gguf"),
        lambda: client.unload_model("tiny-embed-gguf"),
        client.health_check,
        client.running_models,
        client.start_engine,
        lambda: kill(world, signal.SIGKILL),
        lambda: kill(world, signal.SIGTERM),
    ]
    return [*ask * 12, *rest, lambda: restart(world)]


async def restart(world: World) -> None:
    """Stop the engine, which ends all calls, and start it."""
    await world.client.stop_engine()
    await world.client.start_engine()


async def start(world: World) -> None:
    with suppress(EnginePluginError):  # another caller's stop
        await world.client.start_engine()


async def caller(world: World, dice: random.Random) -> None:
    """Make one caller's calls and cancel some. Each ends in time with an answer or an EnginePluginError."""
    for _ in range(CALLS):
        calling = asyncio.ensure_future(dice.choice(calls(world))())
        wait = dice.choice([LIMIT, LIMIT, LIMIT, 0.02, 0.2])
        done, _pending = await asyncio.wait({calling}, timeout=wait)
        assert done or wait < LIMIT, calling
        calling.cancel()
        try:
            await calling
        except (asyncio.CancelledError, EnginePluginError, StopAsyncIteration) as error:
            if "Call StartEngine" in str(error):
                await start(world)


@pytest.mark.promise("P4", "P5", "F16", "F18", "F20", "F24")
@pytest.mark.parametrize("round_", ROUNDS)
async def test_random_calls_and_faults_end_with_a_working_plugin(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, round_: int
) -> None:
    monkeypatch.setattr(server, "HEALTH_TIMEOUT", pace(0.1))
    monkeypatch.setattr(answers, "_DEATH_NOTICE", 0.2)
    dice = random.Random(round_)  # noqa: S311  # to be repeated, not to be secret
    world = await begin(
        *(life(dice) for _ in range(30)),
        {},
        max_loaded_models=dice.choice([1, 2]),
        transport=dice.choice(["unix", "tcp"]),
        parallel=2,
        drain_timeout=0.3,
        stop_timeout=0.2,
        start_timeout=pace(1),
        health_interval=0.05,
        health_failures=2,
        hung_timeout=pace(0.5),
        restart_limit=dice.choice([0, 2]),
    )
    own_dice = [random.Random(dice.random()) for _ in range(CALLERS)]  # noqa: S311  # as above
    callers = [asyncio.create_task(caller(world, one)) for one in own_dice]
    try:
        await asyncio.gather(*callers)
    finally:
        for one in callers:
            one.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    print(f"{world.life} lives, {len(world.fake.events('request'))} requests")
    world.fake.behave({})
    async with asyncio.timeout(LIMIT):
        await restart(world)
        assert await world.chat() == words(TOKENS)
        assert (await world.client.invoke("embed", EMBED))["data"]
        assert len(world.processes()) == min(2, world.engine.pool.limit)
        await world.client.stop_engine()
    assert world.leftovers() == []
    gc.collect()  # what asyncio has to complain about, it says when a task is collected
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
