"""Deadlines of the calls between a host and the engine, and hosts that leave."""

from __future__ import annotations

import asyncio
import json
import math
import time
from contextlib import aclosing, suppress
from typing import Any

import grpc
import grpc.aio
import pytest

from engine_plugin import deadlines
from engine_plugin.errors import (
    DeadlineError,
    EnginePluginError,
)
from engine_plugin.host import OperateStatus
from engine_plugin.protocol.stubs import provider_pb2 as pb
from engine_plugin.system.addresses import grpc_target
from tests.patience import pace
from tests.served_plugin import HANG, Serve, gone, still_well

from .host.conftest import sockets as sockets  # noqa: PLC0414  # a fixture
from .served_plugin import serve as serve  # noqa: PLC0414  # a fixture

SHORT = math.ceil(pace(0.5))
"""Seconds of a service's timeout, whole ones as in plugin.yaml, in which this machine answers what is no work."""


@pytest.mark.promise("P6")
async def test_manifest_timeout_is_408_for_a_unary_call(serve: Serve) -> None:
    client, engine = await serve(timeout=SHORT)
    began = time.monotonic()
    asked = {"service_name": "chat", "request_data": HANG}
    [answer] = [part async for part in client.call_json("InvokeService", asked)]
    assert time.monotonic() - began >= 0.9
    assert engine.ended.is_set()
    assert answer["code"] == 408
    assert answer["message"].startswith(f"chat: not done in {SHORT} s. Raise services[].timeout in plugin.yaml")
    await still_well(client)


@pytest.mark.promise("P6")
async def test_manifest_timeout_is_a_grpc_status_for_a_stream(serve: Serve) -> None:
    client, engine = await serve(timeout=SHORT)
    request = pb.InvokeServiceRequest(service_name="chat", request_data=json.dumps(HANG).encode())
    async with grpc.aio.insecure_channel(grpc_target(client.address)) as channel:
        invoke = channel.unary_stream(
            "/protocol.ProviderService/InvokeServiceStream",
            request_serializer=pb.InvokeServiceRequest.SerializeToString,
            response_deserializer=pb.InvokeServiceStreamResponse.FromString,
        )
        call: Any = invoke(request)
        chunks = [await call.read(), await call.read()]
        assert [(part.code, part.chunk_data) for part in chunks] == [
            (200, b'data: {"n":0}\n\n'),
            (200, b'data: {"n":1}\n\n'),
        ]
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert f"chat: not done in {SHORT} s" in str(raised.value.details())
    assert engine.ended.is_set()
    await still_well(client)


@pytest.mark.promise("P6")
async def test_manifest_timeout_ends_a_conversation(serve: Serve) -> None:
    client, engine = await serve(timeout=SHORT)
    async with client.invoke_bidi("speech-to-text-ws") as conversation:
        await conversation.send(b"hang")
        with pytest.raises(DeadlineError, match=f"speech-to-text-ws: not done in {SHORT} s"):
            await anext(conversation)
    assert engine.ended.is_set()
    await still_well(client)


@pytest.mark.promise("P6")
@pytest.mark.parametrize("timeout", [-1, 100])
async def test_shorter_deadline_of_the_host_applies(serve: Serve, timeout: int) -> None:
    client, engine = await serve(timeout=timeout)
    with pytest.raises(DeadlineError, match="did not answer in time"):
        await client.invoke("chat", HANG, timeout=pace(0.2))
    await gone(engine)
    async with client.stream("chat", HANG, timeout=pace(0.2)) as chunks:
        with pytest.raises(DeadlineError):
            async for _ in chunks:
                pass
    await gone(engine)
    await still_well(client)


async def test_negative_timeout_means_no_timeout(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "UNARY", 0.01)
    monkeypatch.setattr(deadlines, "STREAM", 0.01)
    client, engine = await serve(timeout=-1)
    asking = asyncio.create_task(client.invoke("chat", HANG))
    await engine.working.wait()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await asyncio.shield(asking)
    asking.cancel()
    await gone(engine)


async def test_default_timeouts_apply_without_a_manifest_timeout(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "UNARY", 0.05)
    monkeypatch.setattr(deadlines, "STREAM", 0.06)
    client, _ = await serve()
    with pytest.raises(DeadlineError, match=r"chat: not done in 0\.05 s"):
        await client.invoke("chat", HANG)
    async with client.stream("chat", HANG) as chunks:
        with pytest.raises(DeadlineError, match=r"chat: not done in 0\.06 s"):
            async for _ in chunks:
                pass


@pytest.mark.promise("F23", "F24")
@pytest.mark.parametrize("how", ["unary", "stream", "bidi", "pull"])
async def test_host_that_leaves_cancels_the_work(serve: Serve, how: str) -> None:
    client, engine = await serve(timeout=-1)
    if how == "unary":
        asking = asyncio.create_task(client.invoke("chat", HANG))
        await engine.working.wait()
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
    elif how == "stream":
        async with client.stream("chat", HANG):
            await engine.working.wait()
    elif how == "bidi":
        async with client.invoke_bidi("speech-to-text-ws") as conversation:
            await conversation.send(b"hang")
            await engine.working.wait()
    else:
        async with aclosing(client.pull_model_stream("hang")) as steps:
            assert (await anext(steps))["status"] == "downloading"
            await engine.working.wait()
    await gone(engine)
    await still_well(client)


@pytest.mark.promise("P6")
async def test_lifecycle_calls_have_a_timeout(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client, engine = await serve()
    engine.failing["hang"] = EnginePluginError()
    monkeypatch.setattr(deadlines, "START", 0.05)
    with pytest.raises(DeadlineError, match=r"^StartEngine: not done in 0\.05 s\. Try again"):
        await client.start_engine("gpu")
    assert engine.ended.is_set()
    assert await client.get_operate_status() is OperateStatus.ERROR
    monkeypatch.setattr(deadlines, "LOAD", 0.05)
    with pytest.raises(DeadlineError, match=r"^UnloadModel: "):
        await client.unload_model("hang")
