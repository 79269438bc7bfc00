"""Death of an engine: it is detected, reported and followed by a restart."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import (
    BadGatewayError,
    EngineDiedError,
    EnginePluginError,
    PreconditionError,
    UnavailableError,
)
from engine_plugin.process import memory
from engine_plugin.process.engine_process import ProcessState
from engine_plugin.process.entry import UNUSABLE
from tests.engines.llamacpp.running import eventually
from tests.fake_engine.program import TOKENS
from tests.patience import LIMIT

from .world import HELLO, dead, words

if TYPE_CHECKING:
    from .world import Begin

LAST_LINE = "0.9 E ggml_abort: out of luck"


def dies(**how: Any) -> dict[str, Any]:
    """A process run that ends with the first chat."""
    return {"rules": [{"on": "chat", "do": "die", "lines": [LAST_LINE], **how}]}


@pytest.mark.promise("F20", "P2")
async def test_idle_engine_that_dies_is_restarted(begin: Begin) -> None:
    """No call is made before the restart; the next one is answered."""
    world = await begin({})
    await world.client.load_model("tiny-chat-gguf")
    first = world.processes()
    os.kill(first[0], signal.SIGKILL)
    await world.fake.event("loaded", life=2)
    await eventually(lambda: world.state() is ProcessState.READY)
    await world.client.load_model("tiny-chat-gguf")
    assert world.processes() != first
    assert world.life == 2
    assert await world.loaded() == ["tiny-chat-gguf"]
    assert await world.health() == "ready: 1 models loaded"
    assert await world.chat() == words(TOKENS)


@pytest.mark.promise("F20", "P5")
@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"code": 7}, "exit code 7"),
        ({"code": 0}, "exit code 0"),
        ({"signal": "SIGSEGV"}, r"SIGSEGV \(exit code -11\)"),
        ({"code": 7, "hangup": True}, "exit code 7"),
    ],
)
async def test_death_before_the_answer_is_named_in_the_error(begin: Begin, how: dict[str, Any], named: str) -> None:
    world = await begin(dies(**how), {})
    with pytest.raises(
        BadGatewayError, match=rf"tiny-chat-gguf died: {named}\. Last lines: .*{re.escape(LAST_LINE)}"
    ):
        await asyncio.wait_for(world.chat(), LIMIT)
    assert await world.chat() == words(TOKENS)
    assert world.life == 2


@pytest.mark.promise("F20", "P5")
@pytest.mark.parametrize("stream", [True, False])
async def test_death_during_the_answer_ends_the_stream_with_the_cause(begin: Begin, stream: bool) -> None:
    """The events before it arrive, then the error."""
    world = await begin(dies(after=3, signal="SIGABRT"), {})
    got: list[bytes] = []
    with pytest.raises(EngineDiedError, match=rf"SIGABRT.*{re.escape(LAST_LINE)}"):
        await asyncio.wait_for(world.stream(got) if stream else world.chat(), LIMIT)
    if stream:
        whole = b"".join(got)
        assert whole.count(b'"content"') == 4
        assert b"[DONE]" not in whole
    assert await world.stream()
    assert world.life == 2


@pytest.mark.promise("F20", "F18")
async def test_calls_during_a_restart_wait_and_succeed(begin: Begin) -> None:
    world = await begin({})
    gate = world.fake.gate("load")
    world.fake.behave({}, {"load_until": str(gate)})
    await world.client.load_model("tiny-chat-gguf")
    os.kill(world.processes()[0], signal.SIGKILL)
    await world.fake.event("listening", life=2)
    assert await world.loaded() == []
    waiting: list[asyncio.Task[Any]] = [
        asyncio.create_task(world.client.load_model("tiny-chat-gguf")) for _ in range(25)
    ]
    waiting += [asyncio.create_task(world.chat()) for _ in range(25)]
    await eventually(lambda: world.users() == 50)
    gate.touch()
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*waiting)
    assert world.life == 2


@pytest.mark.promise("F20", "F18", "P2", "P4")
async def test_health_check_reports_the_restart(begin: Begin) -> None:
    world = await begin({}, restart_backoff=60)
    await world.client.load_model("tiny-chat-gguf")
    os.kill(world.processes()[0], signal.SIGKILL)
    await eventually(lambda: world.state() is ProcessState.RECOVERING)
    assert re.search("^degraded: tiny-chat-gguf is being restarted: .* died: SIGKILL", await world.health())
    assert await world.loaded() == []
    # Neither a stop nor an unload waits for the end of the back-off.
    async with asyncio.timeout(LIMIT):
        await world.client.unload_model("tiny-chat-gguf")
    assert world.life == 1
    assert await world.chat() == words(TOKENS)
    os.kill(world.processes()[0], signal.SIGKILL)
    await eventually(lambda: world.state() is ProcessState.RECOVERING)
    waiting = asyncio.create_task(world.chat())
    await eventually(lambda: world.users() == 1)
    async with asyncio.timeout(LIMIT):
        await world.client.stop_engine()
        with pytest.raises(UnavailableError, match="was stopped"):
            await waiting
    assert world.life == 2


@pytest.mark.promise("F20", "P2")
async def test_engine_that_dies_repeatedly_is_left_dead_at_the_restart_limit(begin: Begin) -> None:
    """Its failure names the cause; the next call starts it once more."""
    deadly = {"rules": [{"on": "health", "from": 2, "do": "die", "code": 3, "lines": [LAST_LINE]}]}
    world = await begin(deadly, deadly, deadly, {}, restart_limit=2, health_interval=0.05)
    await world.client.load_model("tiny-chat-gguf")
    await world.fake.event("exiting", life=3)
    await eventually(lambda: world.state() is ProcessState.FAILED)
    assert world.life == 3
    assert await world.loaded() == []
    with pytest.raises(UnavailableError, match="died: exit code 3") as told:
        await world.health()
    health = str(told.value)
    assert LAST_LINE in health
    assert "died 3 times in a row" in health
    assert await world.chat() == words(TOKENS)
    assert (await world.health()).startswith("ready")
    assert world.life == 4


@pytest.mark.promise("H7", "H8")
async def test_health_check_is_503_until_a_start_when_no_model_serves(
    begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    """A host restarts an unhealthy engine by StartEngine, and polls often: only changes are logged."""
    caplog.set_level(logging.INFO, "engine_plugin.server.servicer")
    deadly = {"rules": [{"on": "health", "from": 2, "do": "die", "code": 3}]}
    world = await begin(of={"tiny_chat_gguf": [deadly, {}]}, restart_limit=0, health_interval=0.05)
    await world.client.load_model("tiny-embed")
    await world.client.load_model("tiny-chat")
    await eventually(lambda: world.state() is ProcessState.FAILED)
    assert (await world.health()).startswith("degraded: "), "another model serves"
    await world.client.unload_model("tiny-embed")
    for _ in range(3):
        with pytest.raises(UnavailableError, match="died: exit code 3"):
            await world.health()
    assert len([record for record in caplog.records if "HealthCheck" in record.message]) == 1
    await world.client.start_engine()
    assert await world.health() == "ready: 1 models loaded"
    await world.client.stop_engine()
    for _ in range(3):
        with pytest.raises(UnavailableError, match="StartEngine"):
            await world.health()
    assert len([record for record in caplog.records if "HealthCheck" in record.message]) == 2


@pytest.mark.promise("H7")
async def test_failed_start_engine_names_the_cause(begin: Begin) -> None:
    deadly = {"rules": [{"on": "health", "from": 2, "do": "die", "code": 3}]}
    world = await begin(deadly, {"load_exit": {"code": 5}}, {}, restart_limit=0, health_interval=0.05)
    await world.client.load_model("tiny-chat")
    await eventually(lambda: world.state() is ProcessState.FAILED)
    with pytest.raises(UnavailableError, match="exit code 5"):
        await world.client.start_engine()
    await world.client.start_engine()
    assert await world.chat() == words(TOKENS)


@pytest.mark.promise("F20")
async def test_death_of_one_model_does_not_affect_the_others(begin: Begin) -> None:
    gate_free = {"rules": [{"on": "embed", "do": "die", "code": 1}]}
    world = await begin(of={"tiny_embed_gguf": [gate_free, {}]})
    async with world.client.stream("chat", HELLO | {"max_tokens": -1}) as chunks:
        await anext(chunks)
        with pytest.raises(EngineDiedError, match="tiny-embed-gguf died: exit code 1"):
            await world.client.invoke("embed", {"input": "x"})
        for _ in range(3):
            assert await anext(chunks)
        assert (await world.client.invoke("embed", {"input": "x"}))["data"]
        assert await anext(chunks)
    assert world.life == 3


@pytest.mark.promise("F20", "F18")
async def test_queued_requests_survive_a_death(begin: Begin) -> None:
    """Their requests were not sent, so the next process run can answer them."""
    gates = {"rules": [{"on": "chat", "do": "hold", "after": 1, "until": "/nowhere"}]}
    world = await begin(gates, {}, parallel=2)
    asking = [asyncio.create_task(world.chat()) for _ in range(12)]
    await world.fake.event("begun", count=2)
    await eventually(lambda: world.users() == 12)
    os.kill(world.processes()[0], signal.SIGSEGV)
    async with asyncio.timeout(LIMIT):
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert sum(isinstance(outcome, BadGatewayError) for outcome in outcomes) == 2
    assert sum(outcome == words(TOKENS) for outcome in outcomes) == 10
    assert world.life == 2


@pytest.mark.promise("U10")
@pytest.mark.parametrize("way", ["another mode", "an unload"])
async def test_queued_requests_are_answered_by_the_replacement(begin: Begin, way: str) -> None:
    """As in an upgrade: running requests break off at the end of drain_timeout, queued ones are answered."""
    gates = {"rules": [{"on": "chat", "do": "hold", "after": 1, "until": "/nowhere"}]}
    world = await begin(gates, {}, parallel=2, drain_timeout=0.2)
    asking = [asyncio.create_task(world.chat()) for _ in range(8)]
    await world.fake.event("begun", count=2)
    await eventually(lambda: world.users() == 8)
    async with asyncio.timeout(LIMIT):
        if way == "another mode":
            await world.client.start_engine("cpu")
        else:
            await world.client.unload_model("tiny-chat")
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert sum(isinstance(outcome, EnginePluginError) for outcome in outcomes) == 2
    assert sum(outcome == words(TOKENS) for outcome in outcomes) == 6
    assert world.life == 2


@pytest.mark.promise("U10")
async def test_stop_ends_queued_requests(begin: Begin) -> None:
    gates = {"rules": [{"on": "chat", "do": "hold", "after": 1, "until": "/nowhere"}]}
    world = await begin(gates, {}, parallel=1)
    asking = [asyncio.create_task(world.chat()) for _ in range(4)]
    await world.fake.event("begun")
    await eventually(lambda: world.users() == 4)
    async with asyncio.timeout(LIMIT):
        await world.client.stop_engine()
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(outcome, UnavailableError | BadGatewayError) for outcome in outcomes)
    assert world.life == 1


@pytest.mark.promise("F20", "F24", "P4")
async def test_deaths_at_any_moment_end_with_a_working_engine(begin: Begin) -> None:
    """Each process run dies at another moment, among requests, loads and unloads."""
    moments: list[dict[str, Any]] = [
        {"load_exit": {"code": 1}},
        {"rules": [{"on": "health", "do": "die", "code": 2}]},
        {"rules": [{"on": "probe", "do": "die", "code": 3}]},
        dies(code=4),
        dies(after=0, code=5),
        dies(after=TOKENS, code=6),
        {"say": ["hello"], "load_exit": {"signal": "SIGKILL"}},
    ]
    world = await begin(*moments, {}, restart_limit=1)
    async with asyncio.timeout(LIMIT):
        while True:
            outcomes = await asyncio.gather(
                world.chat(), world.client.load_model("tiny-chat-gguf"), world.stream(), return_exceptions=True
            )
            assert all(not isinstance(one, BaseException) or isinstance(one, EnginePluginError) for one in outcomes)
            if outcomes[0] == words(TOKENS) and isinstance(outcomes[2], bytes):
                break
    assert world.life >= len(moments)
    assert [dead(event["pid"]) for event in world.fake.events("started")] == [True] * (world.life - 1) + [False]


@pytest.mark.promise("U8")
@pytest.mark.parametrize("space", [False, True], ids=["of the container", "of a process's addresses"])
async def test_model_without_enough_memory_is_rejected_before_its_start(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, space: bool
) -> None:
    world = await begin({})
    if space:
        monkeypatch.setattr(memory, "address_space", lambda: 1024)
    else:
        monkeypatch.setattr(memory, "room", lambda: memory.Room(1024 * 1024, 256 * 1024 * 1024, "container"))
    limit = "ulimit -v lets each process have 1 KiB" if space else "1 MiB of the container's 256 MiB are free"
    with pytest.raises(PreconditionError, match=rf"tiny-chat-gguf needs 1\d MiB of memory, and {limit}"):
        await world.client.load_model("tiny-chat")
    assert world.life == 0
    monkeypatch.undo()
    assert await world.chat() == words(TOKENS)


@pytest.mark.promise("U8")
@pytest.mark.parametrize("how", [{"signal": "SIGABRT"}, {"code": UNUSABLE}], ids=["ended", "told"])
async def test_death_for_lack_of_memory_is_reported_with_figures(begin: Begin, how: dict[str, Any]) -> None:
    """It is not reported as an invalid model, which would be 412."""
    lines = ["terminate called after throwing an instance of 'std::bad_alloc'"]
    world = await begin({"load_exit": {**how, "lines": lines}}, {})
    with pytest.raises(UnavailableError, match=r"It got too little memory: [\d.]+ [KMGT]iB of the .* are free"):
        await world.client.load_model("tiny-chat")
