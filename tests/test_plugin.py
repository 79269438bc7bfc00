"""The plugin between a host and its engine: services, status and start."""

from __future__ import annotations

from typing import cast

import pytest

from engine_plugin.engines.base import HealthState
from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    EngineStartError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.host import OperateStatus, events
from tests.served_plugin import HELLO, Serve, gone

from .host.conftest import sockets as sockets  # noqa: PLC0414  # a fixture
from .served_plugin import serve as serve  # noqa: PLC0414  # a fixture

# Services


async def test_requests_reach_the_engine_unchanged(serve: Serve) -> None:
    client, engine = await serve()
    request = HELLO | {"seed": 1, "anything": {"deep": [1, None]}, "model": "mine", "temperature": 0.5}
    assert await client.invoke("chat", request) == {"service": "chat", "model": "mine"}
    assert engine.requests == [request]


async def test_request_without_a_model_uses_the_default(serve: Serve) -> None:
    client, engine = await serve()
    for unnamed in ({}, {"model": None}, {"model": ""}):
        await client.invoke("chat", HELLO | unnamed)
        assert engine.requests[-1]["model"] == "small"
    with pytest.raises(InvalidRequestError, match=r"^model: is missing, and plugin.yaml has no default_model"):
        await client.invoke("rerank", {"query": "a", "documents": ["a"]})


async def test_trivial_request_does_not_reach_the_engine(serve: Serve) -> None:
    client, engine = await serve()
    assert (await client.invoke("embed", {"input": []}))["data"] == []
    assert engine.requests == []


async def test_stream_passes_chunks_with_metadata(serve: Serve) -> None:
    client, engine = await serve()
    async with client.stream("chat", HELLO | {"chunks": 3}) as chunks:
        assert [event["n"] async for event in events(chunks)] == [0, 1, 2]
    await gone(engine)
    engine.failing["chunk"] = BadGatewayError("it broke off")
    async with client.stream("chat", HELLO) as chunks:
        assert [await anext(chunks), await anext(chunks)] == [b'data: {"n":0}\n\n', b'data: {"n":1}\n\n']
        with pytest.raises(BadGatewayError, match=r"^it broke off$"):
            await anext(chunks)
    engine.failing = {"stream": UnavailableError("no room")}
    async with client.stream("chat", HELLO) as chunks:
        with pytest.raises(UnavailableError, match=r"^no room$"):
            await anext(chunks)


async def test_conversation_passes_messages_in_both_directions(serve: Serve) -> None:
    client, engine = await serve()
    async with client.invoke_bidi("speech-to-text-ws") as conversation:
        await conversation.send(b"abc", metadata={"rate": "16000"})
        first = await anext(conversation)
        assert (first.data, first.type) == (b"cba", "binary")
        assert first.metadata == {"service": "speech-to-text-ws", "model": "small", "rate": "16000"}
        await conversation.send("{}")
        await conversation.done_sending()
        assert [(answer.data, answer.type) async for answer in conversation] == [(b"}{", "text")]
    await gone(engine)
    async with client.invoke_bidi("speech-to-text-ws") as conversation:
        await conversation.send("text")
        with pytest.raises(InvalidRequestError, match=r"^data: is not JSON"):
            await anext(conversation)
    await gone(engine)
    async with client.invoke_bidi("speech-to-text-ws") as conversation:
        await conversation.send(b"fail")
        with pytest.raises(EnginePluginError, match="does not understand"):
            await anext(conversation)
    await gone(engine)
    async with client.invoke_bidi("speech-to-text-ws") as conversation:
        await conversation.done_sending()
        with pytest.raises(InvalidRequestError, match="ended before its first message"):
            await anext(conversation)
    async with client.invoke_bidi("chat") as conversation:
        await conversation.send("a")
        with pytest.raises(UnsupportedError, match=r"^service_name: chat is not bidirectional"):
            await anext(conversation)


@pytest.mark.parametrize(
    ("service", "error", "message"),
    [
        ("", InvalidRequestError, "^service_name: is empty; this plugin has chat, embed, rerank"),
        ("nope", NotFoundError, "has no service 'nope'"),
        ("text-to-image", UnsupportedError, "^service_name: the engine llamacpp does not support text-to-image"),
        ("speech-to-text-ws", UnsupportedError, "cannot be called with a JSON request"),
    ],
)
async def test_undeclared_service_is_404(
    serve: Serve, service: str, error: type[EnginePluginError], message: str
) -> None:
    client, _ = await serve()
    with pytest.raises(error, match=message):
        await client.invoke(service, HELLO)
    async with client.stream(service, HELLO) as chunks:
        with pytest.raises(error, match=message):
            await anext(chunks)


# Status


@pytest.mark.promise("P7")
async def test_operate_status_follows_starts_and_stops(serve: Serve) -> None:
    client, engine = await serve()
    assert await client.get_operate_status() is OperateStatus.RUNNING  # a fresh plugin may be revived
    await client.stop_engine()
    assert await client.get_operate_status() is OperateStatus.STOPPED
    engine.failing["start"] = EngineStartError("exit code 1")
    with pytest.raises(UnavailableError, match="exit code 1"):
        await client.start_engine()
    assert await client.get_operate_status() is OperateStatus.ERROR
    del engine.failing["start"]
    await client.start_engine()
    assert await client.get_operate_status() is OperateStatus.RUNNING
    engine.failing["stop"] = EnginePluginError("it does not stop")
    with pytest.raises(EnginePluginError, match="it does not stop"):
        await client.stop_engine()
    assert await client.get_operate_status() is OperateStatus.STOPPED


@pytest.mark.parametrize("status", list(OperateStatus))
async def test_host_can_set_the_operate_status(serve: Serve, status: OperateStatus) -> None:
    client, _ = await serve()
    await client.set_operate_status(status)
    assert await client.get_operate_status() is status


@pytest.mark.parametrize("status", [3, -1, 2**31 - 1])
async def test_unknown_operate_status_is_rejected(serve: Serve, status: int) -> None:
    client, _ = await serve()
    with pytest.raises(InvalidRequestError, match=rf"^status: {status} is unknown; it must be 0 stopped, 1 running"):
        await client.set_operate_status(cast("OperateStatus", status))
    assert await client.get_operate_status() is OperateStatus.RUNNING


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [("", "auto"), ("auto", "auto"), ("daemon", "auto"), ("standard", "auto"), (" GPU ", "gpu"), ("cpu", "cpu")],
)
async def test_modes_of_hosts_are_mapped(serve: Serve, mode: str, wanted: str) -> None:
    client, engine = await serve()
    await client.start_engine(mode)
    assert engine.modes == [wanted]


async def test_unknown_mode_is_rejected_without_a_change(serve: Serve) -> None:
    client, engine = await serve()
    with pytest.raises(InvalidRequestError, match=r"^mode: 'turbo' is unknown"):
        await client.start_engine("turbo")
    assert engine.modes == []
    assert await client.get_operate_status() is OperateStatus.RUNNING


async def test_health_check_reports_the_engine(serve: Serve) -> None:
    client, engine = await serve()
    assert await client.health_check() == "ready: as told"
    engine.state = HealthState.DEGRADED
    assert await client.health_check() == "degraded: as told"
    engine.state = HealthState.DEAD
    with pytest.raises(UnavailableError, match=r"^as told$"):
        await client.health_check()


async def test_local_engines_need_no_authentication(serve: Serve) -> None:
    client, _ = await serve()
    for attempt in (client.set_auth("apikey", {"key": "s"}), client.validate_auth(), client.refresh_auth()):
        with pytest.raises(UnsupportedError, match="needs no authentication"):
            await attempt
