"""Wrong, partial and missing answers of an engine: an error in bounded time, and the next call works."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import BadGatewayError, DeadlineError, EnginePluginError, UnavailableError
from engine_plugin.transport import answers
from tests.engines.llamacpp.running import eventually
from tests.fake_engine.program import TOKENS
from tests.patience import LIMIT, pace

from .world import EMBED, HELLO, words

if TYPE_CHECKING:
    from .world import Begin, World

Fault = tuple[dict[str, Any], type[EnginePluginError], str]

BEFORE: list[Fault] = [
    ({"do": "status", "status": 503, "message": "busy"}, UnavailableError, "the engine has no room now: busy"),
    ({"do": "status", "status": 500, "message": "oops"}, BadGatewayError, "the engine answered 500: oops"),
    ({"do": "status", "status": 401}, BadGatewayError, "the engine answered 401"),
    ({"do": "status", "status": 302}, BadGatewayError, "the engine answered 302"),
    ({"do": "garbage"}, BadGatewayError, "does not answer in HTTP"),
    ({"do": "garbage", "open": True}, BadGatewayError, "does not answer in HTTP"),
    ({"do": "garbage", "endless": True}, BadGatewayError, "does not answer in HTTP"),
    ({"do": "truncated", "where": "head"}, BadGatewayError, "closed the connection inside the head"),
    ({"do": "truncated", "where": "body"}, BadGatewayError, "broke off in the middle of its answer"),
    ({"do": "truncated", "where": "chunk"}, BadGatewayError, "broke off in the middle of its answer"),
    ({"do": "length", "by": 5}, BadGatewayError, "broke off in the middle of its answer"),
    ({"do": "reset", "count": 2}, BadGatewayError, "closed the connection without an answer"),
    ({"do": "close", "count": 2}, BadGatewayError, "closed the connection without an answer"),
    ({"do": "close_writing", "count": 2}, BadGatewayError, "closed the connection without an answer"),
]
AMID: list[Fault] = [
    ({"do": "cut", "after": 2}, BadGatewayError, "stream ended before it was done"),
    ({"do": "event", "after": 2, "data": {"error": {"code": 500, "message": "NaN"}}}, BadGatewayError, "500: NaN"),
    ({"do": "event", "after": 0, "data": {"error": {"code": 503, "message": "full"}}}, UnavailableError, "full"),
    ({"do": "event", "after": 2, "data": {"error": "what"}}, BadGatewayError, "the engine answered 500: what"),
]


async def play(world: World, service: str, faults: list[Fault], *, stream: bool) -> None:
    """Play each fault for one request; after each, the same process gives a good answer."""
    request = HELLO if service == "chat" else EMBED
    for rule, kind, named in faults:
        before = len(world.fake.events("request", service=service))
        world.fake.behave({"rules": [{"on": service, "from": before + 1, "count": 1} | rule]})
        with pytest.raises(kind, match=named) as caught:
            async with asyncio.timeout(LIMIT):
                await (world.stream() if stream else world.client.invoke(service, request))
        assert type(caught.value) is kind, rule
        assert "Traceback" not in str(caught.value)
        async with asyncio.timeout(LIMIT):
            assert await (world.stream() if stream else world.client.invoke(service, request))
    assert world.life == 1


@pytest.mark.promise("P26", "P5")
@pytest.mark.parametrize(
    ("transport", "service", "stream"),
    [("unix", "chat", False), ("unix", "chat", True), ("unix", "embed", False), ("tcp", "chat", True)],
)
async def test_fault_before_the_answer_is_an_error(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, transport: str, service: str, stream: bool
) -> None:
    monkeypatch.setattr(answers, "_DEATH_NOTICE", 0.05)  # each broken connection may mean a death, but none does
    world = await begin({}, transport=transport)
    await world.client.load_model("tiny-embed-gguf" if service == "embed" else "tiny-chat-gguf")
    await play(world, service, BEFORE, stream=stream)


@pytest.mark.promise("P26", "P5")
@pytest.mark.parametrize("stream", [False, True])
async def test_fault_during_the_answer_is_an_error(begin: Begin, stream: bool) -> None:
    world = await begin({})
    await world.client.load_model("tiny-chat-gguf")
    await play(world, "chat", AMID, stream=stream)


@pytest.mark.promise("P5")
async def test_events_before_a_fault_arrive(begin: Begin) -> None:
    world = await begin({"rules": [{"on": "chat", "do": "cut", "after": 3}]})
    got: list[bytes] = []
    with pytest.raises(BadGatewayError, match="stream ended before it was done"):
        await world.stream(got)
    assert re.findall(rb"w\d", b"".join(got)) == [b"w0", b"w1", b"w2"]


@pytest.mark.promise("P26")
async def test_answer_of_another_format_is_an_error(begin: Begin) -> None:
    answer = {"do": "answer", "body": {"results": [{"index": "x"}]}}
    rules = [{"on": "rerank", "count": 1} | answer, {"on": "chat", "count": 2} | answer]
    world = await begin({"rules": rules})
    with pytest.raises(BadGatewayError, match="rerank answer is not understood"):
        await world.client.invoke("rerank", {"query": "q", "documents": ["d"]})
    with pytest.raises(BadGatewayError, match="stream ended"):
        await world.chat()
    with pytest.raises(BadGatewayError, match="stream ended"):
        await world.stream()
    assert await world.chat() == words(TOKENS)


@pytest.mark.promise("P8")
async def test_burst_of_503_does_not_restart_the_engine(begin: Begin) -> None:
    world = await begin({"rules": [{"on": "chat", "count": 20, "do": "status", "status": 503}]}, parallel=8)
    async with asyncio.timeout(LIMIT):
        outcomes = await asyncio.gather(*(world.chat() for _ in range(40)), return_exceptions=True)
    assert sum(isinstance(outcome, UnavailableError) for outcome in outcomes) == 20
    assert sum(outcome == words(TOKENS) for outcome in outcomes) == 20
    assert (await world.health()).startswith("ready")
    assert world.life == 1


@pytest.mark.promise("F23", "P6")
async def test_unanswered_request_ends_at_the_deadline(begin: Begin) -> None:
    """The answer stops at different points; in each case the connection to the engine is closed."""
    faults: list[dict[str, Any]] = [{"do": "hang"}, {"do": "head"}, {"do": "deaf"}, {"do": "hang", "after": 2}]
    rules = [{"on": "chat", "from": number + 1, "count": 1} | fault for number, fault in enumerate(faults)]
    world = await begin({"rules": rules})
    await world.client.load_model("tiny-chat-gguf")
    for_all = (world.client.invoke("chat", HELLO, timeout=pace(0.5)) for _ in faults)
    outcomes = await asyncio.wait_for(asyncio.gather(*for_all, return_exceptions=True), LIMIT)
    assert {type(outcome) for outcome in outcomes} == {DeadlineError}
    await world.fake.event("client_gone", count=len(faults) - 1)  # who is deaf hears of nothing
    assert await world.chat() == words(TOKENS)
    assert world.life == 1


@pytest.mark.promise("F23")
@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_cancelled_call_closes_the_request_at_the_engine(begin: Begin, transport: str) -> None:
    """Streams and unary calls, before and after the first token, of every service."""
    hang = {"do": "hang"}
    rules = [{"on": "chat", "from": 2} | hang | {"after": 2}, {"on": "chat"} | hang, {"on": "embed"} | hang]
    world = await begin({"rules": rules}, transport=transport)
    await asyncio.gather(*(world.client.load_model(model) for model in ("tiny-chat-gguf", "tiny-embed-gguf")))
    calls = [world.chat(), world.stream(), world.chat(), world.client.invoke("embed", EMBED)]
    for number, call in enumerate(calls):
        service = "embed" if number == 3 else "chat"
        asking = asyncio.create_task(call)
        await world.fake.event("request", service=service, number=1 if number == 3 else number + 1)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        await world.fake.event("client_gone", count=number + 1)
    await eventually(lambda: world.users() == 0 == world.users("tiny-embed-gguf"))
    assert world.life == 2


@pytest.mark.promise("F23")
async def test_abandoned_endless_stream_is_closed_at_the_engine(begin: Begin) -> None:
    world = await begin({}, parallel=1)
    for number in range(3):
        async with world.client.stream("chat", HELLO | {"max_tokens": -1}) as chunks:
            await anext(chunks)
        await world.fake.event("client_gone", service="chat", count=number + 1)
    assert await world.chat() == words(TOKENS)


@pytest.mark.promise("F23")
async def test_call_cancelled_during_the_load_is_not_sent(begin: Begin) -> None:
    world = await begin({})
    gate = world.fake.gate("load")
    world.fake.behave({"load_until": str(gate)})
    asking = asyncio.create_task(world.chat())
    await world.fake.event("listening")
    asking.cancel()
    await eventually(lambda: world.users() == 0)
    gate.touch()
    await world.client.load_model("tiny-chat-gguf")
    assert world.fake.events("request", service="chat") == []
    assert world.life == 1
