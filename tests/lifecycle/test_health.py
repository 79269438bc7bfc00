"""An engine that does not answer: busy is degraded, hung is restarted."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.engines.local import server
from engine_plugin.errors import BadGatewayError
from engine_plugin.process.engine_process import ProcessState
from tests.engines.llamacpp.running import eventually
from tests.fake_engine.program import TOKENS
from tests.patience import LIMIT, pace

from .world import HELLO, words

if TYPE_CHECKING:
    from .world import Begin, World

QUICK: dict[str, Any] = {"health_interval": 0.05, "health_failures": 2}


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the wait for unanswered probes, two seconds by default."""
    monkeypatch.setattr(server, "HEALTH_TIMEOUT", pace(0.15))


async def reach(world: World, state: ProcessState) -> None:
    await eventually(lambda: world.state() is state)


@pytest.mark.promise("F21")
async def test_busy_engine_is_degraded_and_recovers(begin: Begin) -> None:
    """It computes and answers no probe. Its work is not interrupted."""
    world = await begin({}, **QUICK, hung_timeout=pace(0.5))
    gate = world.fake.gate("busy")
    world.fake.behave({"rules": [{"on": "chat", "count": 1, "do": "block", "until": str(gate), "burn": True}]})
    asking = asyncio.create_task(world.chat())
    await world.fake.event("blocked")
    await reach(world, ProcessState.DEGRADED)
    assert (await world.health()).startswith("degraded: tiny-chat-gguf does not answer")
    assert await world.loaded() == ["tiny-chat-gguf"]
    # For longer than a hung one would have lived; the probes count the time.
    await asyncio.wait_for(_probes(world, 6), LIMIT)
    assert not asking.done()
    gate.touch()
    assert await asyncio.wait_for(asking, LIMIT) == words(TOKENS)
    await reach(world, ProcessState.READY)
    assert await world.health() == "ready: 1 models loaded"
    assert world.life == 1


async def _probes(world: World, count: int) -> None:
    for _ in range(count):
        await world.health()


@pytest.mark.promise("F21")
async def test_single_health_answer_does_not_change_the_state(begin: Begin) -> None:
    """Hysteresis in both directions: only consecutive answers count."""
    silence = {"on": "health", "do": "status", "status": 503}
    missed = {"rules": [silence | {"from": number, "count": 2} for number in (3, 6, 9)]}
    world = await begin(missed, health_interval=3600, health_failures=3)
    await world.client.load_model("tiny-chat-gguf")
    for _ in range(10):
        assert (await world.health()).startswith("ready")
    world.fake.behave({"rules": [silence]})
    states = [(await world.health()).partition(":")[0] for _ in range(4)]
    assert states == ["ready", "ready", "degraded", "degraded"]
    asked = len(world.fake.events("request", service="health"))
    world.fake.behave({"rules": [silence | {"from": asked + 2, "count": 1}]})
    states = [(await world.health()).partition(":")[0] for _ in range(4)]
    assert states == ["degraded", "degraded", "degraded", "ready"]
    assert world.life == 1


@pytest.mark.promise("F21")
async def test_degraded_engine_answers_requests(begin: Begin) -> None:
    """It misses the probes and still gets requests."""
    world = await begin({"rules": [{"on": "health", "from": 2, "do": "hang"}]}, **QUICK, hung_timeout=0)
    await world.client.load_model("tiny-chat-gguf")
    await reach(world, ProcessState.DEGRADED)
    async with asyncio.timeout(LIMIT):
        assert await asyncio.gather(*(world.chat() for _ in range(4))) == [words(TOKENS)] * 4
        await world.client.load_model("tiny-chat-gguf")
        await world.client.unload_model("tiny-chat-gguf")
    assert world.leftovers() == []


@pytest.mark.promise("F21", "F20", "P3")
@pytest.mark.parametrize("how", ["block", "stop"])
async def test_hung_engine_is_killed_and_restarted(begin: Begin, how: str) -> None:
    """It neither answers nor computes nor writes output."""
    rules = [{"on": "chat", "from": 3, "do": how}]
    world = await begin({"rules": rules}, {}, **QUICK, hung_timeout=pace(0.5), stop_timeout=0.2)
    assert await world.chat() == await world.chat()
    with pytest.raises(BadGatewayError, match="tiny-chat-gguf hangs: no answer, output or use of the processor"):
        await asyncio.wait_for(world.chat(), LIMIT)
    assert await asyncio.wait_for(world.chat(), LIMIT) == words(TOKENS)
    assert world.life == 2
    assert len(world.processes()) == 1


@pytest.mark.promise("F21", "P3")
async def test_engine_that_streams_but_misses_health_checks_is_not_hung(begin: Begin) -> None:
    """It computes on another device, has no thread for health checks, and streams."""
    rules = [{"on": "health", "from": 2, "do": "hang"}]
    world = await begin({"interval": pace(0.2), "rules": rules}, **QUICK, hung_timeout=pace(0.5))
    assert await asyncio.wait_for(world.chat(), LIMIT) == words(TOKENS)
    assert world.life == 1


@pytest.mark.promise("F21")
async def test_suspended_engine_continues_after_its_resume(begin: Begin) -> None:
    """SIGSTOP, and SIGCONT in time, as with a suspended laptop or a debugger."""
    world = await begin({}, **QUICK)
    async with world.client.stream("chat", HELLO | {"max_tokens": -1}) as chunks:
        await anext(chunks)
        [pid] = world.processes()
        os.kill(pid, signal.SIGSTOP)
        try:
            await reach(world, ProcessState.DEGRADED)
        finally:
            os.kill(pid, signal.SIGCONT)
        await reach(world, ProcessState.READY)
        for _ in range(10):
            assert await anext(chunks)
    assert world.life == 1


@pytest.mark.promise("F21")
async def test_engine_that_writes_its_log_is_not_hung(begin: Begin) -> None:
    """It neither answers nor computes, but still writes its log."""
    world = await begin({}, **QUICK, hung_timeout=pace(0.5))
    rules = [{"on": "health", "from": 2, "do": "hang"}]
    world.fake.behave({"rules": rules, "log_requests": True})
    await world.client.load_model("tiny-chat-gguf")
    await reach(world, ProcessState.DEGRADED)
    await world.fake.event("request", service="health", count=6)
    assert world.life == 1
    assert world.state() is ProcessState.DEGRADED
