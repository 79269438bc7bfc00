"""Server errors before and during a stream, and callers that leave."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from engine_plugin.errors import (
    AuthError,
    BadGatewayError,
    EnginePluginError,
    InvalidRequestError,
    UnavailableError,
)
from tests.patience import LIMIT

from .conftest import ServiceClient
from .shapes import chat, data_of, facts_of, joined

if TYPE_CHECKING:
    from tests.engines.ollama.contract.handle import ContractServer


def text_of(events: bytes, *, native: bool) -> str:
    if native:
        return "".join(event["message"]["content"] for event in data_of(events))
    return joined(events)


@pytest.fixture(params=[False, True], ids=["openai", "native"])
def native(request: pytest.FixtureRequest) -> bool:
    """Whether the host uses Ollama's own JSON."""
    return bool(request.param)


REFUSALS: list[tuple[str, type[EnginePluginError], str]] = [
    ("busy", UnavailableError, "maximum pending requests"),
    ("sign-in", AuthError, "ollama.com/connect"),
    ("forbidden", EnginePluginError, "cloud"),
    ("canceled", UnavailableError, "canceled"),
    ("crashed", BadGatewayError, "model runner has unexpectedly stopped"),
    ("memory", EnginePluginError, "9.5 GiB"),
    ("context", InvalidRequestError, "exceeds the context length"),
    ("error-first", BadGatewayError, "error was encountered"),
    ("gateway", BadGatewayError, "no such host"),
    ("html", BadGatewayError, "502"),
    ("hang-up", BadGatewayError, "without an answer"),
]


@pytest.mark.parametrize(("fault", "kind", "words"), REFUSALS, ids=[fault for fault, *_ in REFUSALS])
async def test_server_errors_are_mapped(
    ask: ServiceClient, server: ContractServer, fault: str, kind: type[EnginePluginError], words: str, native: bool
) -> None:
    name = f"fault-{fault}:latest"
    server.add(name)
    with pytest.raises(kind, match=words):
        await ask.call("chat", chat("hello", name), facts_of(name, native=native))
    with pytest.raises(kind, match=words):
        await ask.collected("chat", chat("hello", name), facts_of(name, native=native))


async def broken_off(ask: ServiceClient, name: str, *, native: bool) -> tuple[str, EnginePluginError]:
    """The text of a stream, and the error that ended it."""
    blocks: list[bytes] = []
    try:
        async with aclosing(ask.blocks("chat", chat("a b c", name), facts_of(name, native=native))) as stream:
            async for block in stream:
                blocks.append(block)  # noqa: PERF401  # those before the error count
    except EnginePluginError as error:
        return text_of(b"".join(blocks), native=native), error
    raise AssertionError("the stream ended without an error")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("error", "unexpected EOF"),
        ("no-done", "ended before it was done"),
        ("cut", "broke off|ended inside"),
        ("garbage", "not a JSON object|before it was done"),
    ],
)
async def test_broken_stream_raises_after_its_text(
    ask: ServiceClient, server: ContractServer, fault: str, words: str, native: bool
) -> None:
    name = f"fault-{fault}:latest"
    server.add(name)
    came, error = await broken_off(ask, name, native=native)
    assert came == "You said:"
    assert isinstance(error, BadGatewayError)
    with pytest.raises(BadGatewayError, match=words):
        await ask.call("chat", chat("a b c", name), facts_of(name, native=native))


@pytest.mark.promise("P25")
@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        ("last-words", "You said: a b"),
        ("all-at-once", "You said: a b"),
        ("crumbs", "You said: a b"),
        ("burst", "You said: a b"),
        ("zero", "You said: a b"),
        ("slow", "You said: a b"),
        ("empty", ""),
    ],
)
async def test_stream_of_any_shape_gives_the_same_answer(
    ask: ServiceClient, server: ContractServer, fault: str, wanted: str, native: bool
) -> None:
    name = f"fault-{fault}:latest"
    server.add(name)
    events = await ask.collected("chat", chat("a b", name), facts_of(name, native=native))
    assert text_of(events, native=native) == wanted
    assert data_of(events)[-1].get("done", True)


@pytest.mark.parametrize(
    ("fault", "streamed", "whole"),
    [
        ("tags", ("Hm, yes.", "You said: a"), ("Hm, yes.", "You said: a")),
        ("tags-twice", ("onetwo", "You said: a"), ("onetwo", "You said: a")),
        ("tags-open", ("Hm, yesYou said: a", ""), ("Hm, yesYou said: a", "")),
        ("tags-closed", ("", "Hm, yes.You said: a"), ("Hm, yes.", "You said: a")),
    ],
)
async def test_thinking_in_tags_is_separated(
    ask: ServiceClient, server: ContractServer, fault: str, streamed: tuple[str, str], whole: tuple[str, str]
) -> None:
    name = f"fault-{fault}:latest"
    server.add(name)
    events = await ask.collected("chat", chat("a", name))
    assert (joined(events, "reasoning_content"), joined(events)) == streamed
    [choice] = data_of(b"data: " + await ask.call("chat", chat("a", name)) + b"\n\n")[0]["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == whole


@pytest.mark.parametrize(("fault", "count"), [("tool-no-id", 1), ("tool-twice", 2)])
async def test_tool_calls_without_ids_get_ids(
    ask: ServiceClient, server: ContractServer, fault: str, count: int
) -> None:
    name = f"fault-{fault}:latest"
    server.add(name, capabilities=["completion", "tools"])
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    events = data_of(await ask.collected("chat", chat("a", name, tools=[tool])))
    calls: list[dict[str, Any]] = []
    for event in events:
        calls += event["choices"][0]["delta"].get("tool_calls", [])
    assert [call["index"] for call in calls] == list(range(count))
    assert len({call["id"] for call in calls if call["id"].startswith("call_")}) == count


@pytest.mark.promise("F23")
async def test_closed_stream_stops_the_server(ask: ServiceClient, server: ContractServer, native: bool) -> None:
    name = f"fault-endless:{'n' if native else 'o'}"
    server.add(name)
    before = len(server.requests("/api/chat", state="left"))
    async with aclosing(ask.blocks("chat", chat("a b c", name), facts_of(name, native=native))) as blocks:
        async for _ in blocks:
            break
    await server.wait("/api/chat", count=before + 1, state="left")


@pytest.mark.promise("F23")
async def test_cancelled_call_stops_the_server(ask: ServiceClient, server: ContractServer, native: bool) -> None:
    name = f"fault-endless:call-{'n' if native else 'o'}"
    server.add(name)
    count = len(server.requests("/api/chat", state="left"))
    seen = len(server.requests("/api/chat"))
    calling = asyncio.create_task(ask.call("chat", chat("a", name), facts_of(name, native=native)))
    await server.wait("/api/chat", count=seen + 1)
    calling.cancel()
    await asyncio.wait({calling})
    await server.wait("/api/chat", count=count + 1, state="left")


async def test_tokens_are_sent_as_they_arrive(contract_server: ContractServer, native: bool) -> None:
    contract_server.add("fault-gated:latest")
    asker = ServiceClient(("127.0.0.1", contract_server.port))
    request, facts = chat("a b", "fault-gated:latest"), facts_of("fault-gated:latest", native=native)
    came = b""
    try:
        async with asyncio.timeout(LIMIT), aclosing(asker.blocks("chat", request, facts)) as blocks:
            async for block in blocks:
                came += block
                if text_of(came, native=native) == "You said:":  # and no more comes before the gate is open
                    contract_server.open_gate()
    finally:
        asker.http.close()
    assert text_of(came, native=native) == "You said: a b"


async def test_choices_are_sequential_and_end_at_an_error(ask: ServiceClient, server: ContractServer) -> None:
    server.add("fault-error:two")
    with pytest.raises(BadGatewayError):
        await ask.collected("chat", chat("only once", "fault-error:two", n=3))
    assert len([body for body in server.bodies("/api/chat") if "only once" in str(body)]) == 1


async def test_connections_are_reused(ask: ServiceClient, server: ContractServer, native: bool) -> None:
    for _ in range(3):
        await ask.collected("chat", chat("hello"), facts_of(native=native))
        await ask.call("chat", chat("hello"), facts_of(native=native))
    connections = psutil.Process().net_connections("tcp")
    assert len([one for one in connections if one.raddr and one.raddr.port == server.port]) == 1
