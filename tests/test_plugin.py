"""The plugin between a host and its engine: deadlines, status and unexpected errors."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import math
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import grpc
import grpc.aio
import pytest

from engine_plugin import deadlines
from engine_plugin.engines.base import HealthState
from engine_plugin.errors import (
    BadGatewayError,
    DeadlineError,
    EngineNotInstalledError,
    EnginePluginError,
    EngineStartError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    PullError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.host import BidiCall, OperateStatus, PluginClient, connect, events
from engine_plugin.manifest import load_manifest
from engine_plugin.plugin import Plugin
from engine_plugin.protocol.stubs import provider_pb2 as pb
from engine_plugin.server import servicer
from engine_plugin.server.grpc_aio import AioServer
from engine_plugin.server.servicer import provider_service
from tests.patience import LIMIT, NEVER, pace
from tests.shipped import shipped, write_manifest

from .host.conftest import sockets as sockets  # noqa: PLC0414  # a fixture
from .small_engine import SmallEngine

if TYPE_CHECKING:
    from pathlib import Path

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
HANG = HELLO | {"hang": True}

Serve: TypeAlias = Callable[..., Awaitable[tuple[PluginClient, SmallEngine]]]


@pytest.fixture
async def serve(tmp_path: Path, sockets: Path) -> AsyncIterator[Serve]:
    """A served plugin whose services have this timeout."""
    async with AsyncExitStack() as stack:

        async def start(timeout: int = 0) -> tuple[PluginClient, SmallEngine]:
            shape = shipped("llamacpp")
            services = [service for service in shape["services"] if service["service_name"] != "generate"]
            speech = services[0] | {"service_name": "speech-to-text-ws", "expose_protocol": "WEBSOCKET"}
            speech["config_ref"] = ""
            speech["capabilities"] = {"support_streaming": True, "support_bidirectional": True}
            image = {key: value for key, value in speech.items() if key != "capabilities"}
            image |= {"service_name": "text-to-image", "expose_protocol": "HTTP"}
            for service in (*services, speech, image):
                service.pop("default_model", None)
                service["timeout"] = timeout
            shape["services"] = [*services, speech, image]
            shape["resources"]["data_dir"] = str(tmp_path / "data")
            write_manifest(tmp_path, shape)
            manifest = load_manifest(tmp_path / "plugin.yaml")
            engine = SmallEngine(manifest)
            server = AioServer()
            server.add(provider_service(Plugin(manifest, engine)))
            unix = sys.platform != "win32"
            address = await server.start(f"unix:{sockets / 's'}" if unix else "127.0.0.1:0")
            stack.push_async_callback(server.stop, 0)
            return await stack.enter_async_context(await connect(address)), engine

        yield start


SHORT = math.ceil(pace(0.5))
"""Seconds of a service's timeout, whole ones as in plugin.yaml, in which this machine answers what is no work."""


async def still_well(client: PluginClient) -> None:
    """Check that the plugin still answers."""
    assert await client.invoke("chat", HELLO) == {"service": "chat", "model": "small"}


async def gone(engine: SmallEngine) -> None:
    """Wait until the engine's work was cancelled and its `finally` ran."""
    async with asyncio.timeout(LIMIT):
        await engine.ended.wait()
    engine.ended.clear()


# Deadlines


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
    call = client._link.open("InvokeServiceStream", request, timeout=None)
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


# What goes wrong


def every_call(client: PluginClient) -> dict[str, Awaitable[object]]:
    """One call for each method of an engine that can fail."""
    return {
        "call": client.invoke("chat", HELLO),
        "check": client.check_engine(),
        "install": client.install_engine(),
        "upgrade": client.upgrade_engine(),
        "init_env": client.init_env(),
        "version": client.get_version(),
        "config": client.get_config(),
        "start": client.start_engine(),
        "stop": client.stop_engine(),
        "health": client.health_check(),
        "list_models": client.list_models(),
        "pull_model": client.pull_model("m"),
        "delete_model": client.delete_model("m"),
        "load_model": client.load_model("m"),
        "unload_model": client.unload_model("m"),
        "running_models": client.running_models(),
    }


@pytest.mark.promise("P30")
async def test_unexpected_exception_is_500_and_the_plugin_continues(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    client, engine = await serve()
    for name, attempt in every_call(client).items():
        engine.failing = {name: KeyError("a secret path")}
        caplog.clear()
        with pytest.raises(
            EnginePluginError, match=r"internal error \(KeyError\); the plugin's log has the det"
        ) as it:
            await attempt
        assert it.value.code == 500
        assert "secret" not in it.value.message
        assert "Traceback" not in it.value.message
        [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert record.exc_info
        assert "a secret path" in caplog.text
    engine.failing = {}
    await still_well(client)


async def test_unwritable_directory_is_not_an_internal_error(serve: Serve) -> None:
    client, engine = await serve()
    engine.failing = {"start": PermissionError(errno.EACCES, "Permission denied", "/srv/data")}
    with pytest.raises(EnginePluginError) as it:
        await client.start_engine()
    assert it.value.code == 500
    assert it.value.message == (
        "/srv/data: Permission denied. Correct the permissions of the data directory, or move it"
    )


@pytest.mark.promise("P5", "P30")
async def test_cancellation_of_shared_work_is_reported_to_the_host(serve: Serve) -> None:
    """Shared work is cancelled while a call waits for it: the host gets an error."""
    client, engine = await serve()
    async with asyncio.timeout(LIMIT):
        for name, attempt in every_call(client).items():
            engine.failing = {name: asyncio.CancelledError()}
            with pytest.raises(EnginePluginError, match=r"internal error \(CancelledError\)"):
                await attempt
        for where in ("stream", "chunk"):
            engine.failing = {where: asyncio.CancelledError()}
            async with client.stream("chat", HELLO) as chunks:
                with pytest.raises(EnginePluginError, match=r"internal error \(CancelledError\)"):
                    async for _ in chunks:
                        pass
        engine.failing = {"converse": asyncio.CancelledError()}
        async with client.invoke_bidi("speech-to-text-ws") as conversation:
            await conversation.send("a")
            with pytest.raises(EnginePluginError, match=r"internal error \(CancelledError\)"):
                await anext(conversation)
    engine.failing = {}
    await still_well(client)


@pytest.mark.promise("P30")
@pytest.mark.parametrize("where", ["stream", "chunk"])
async def test_unexpected_exception_ends_a_stream(serve: Serve, where: str) -> None:
    client, engine = await serve()
    engine.failing = {where: ZeroDivisionError()}
    async with client.stream("chat", HELLO) as chunks:
        with pytest.raises(EnginePluginError, match="internal error") as it:
            async for _ in chunks:
                pass
    assert it.value.code == 500
    engine.failing = {"converse": ZeroDivisionError()}
    async with client.invoke_bidi("speech-to-text-ws") as conversation:
        await conversation.send(b"a")
        with pytest.raises(EnginePluginError, match="internal error"):
            await anext(conversation)
    await still_well(client)


async def test_failed_conversation_stays_open_until_the_host_reads_the_error(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write to a call that has ended can make gRPC drop the messages before the end."""
    monkeypatch.setattr(servicer, "_LEAVE_TAKING", NEVER)
    client, engine = await serve()
    async with asyncio.timeout(LIMIT):
        async with client.invoke_bidi("speech-to-text-ws") as conversation:
            await conversation.send(b"fail")
            await engine.ended.wait()
            for _ in range(10):
                await conversation.send(b"more")
            with pytest.raises(EnginePluginError, match="does not understand"):
                await anext(conversation)
        await still_well(client)


async def test_late_write_does_not_hide_messages_before_the_end(serve: Serve) -> None:
    """gRPC reports the late write in place of the end."""
    client, _engine = await serve()

    async def send_on(conversation: BidiCall) -> None:
        while True:
            await conversation.send(bytes(3_000_000))

    for _ in range(20):
        async with asyncio.timeout(LIMIT), client.invoke_bidi("speech-to-text-ws") as conversation:
            await conversation.send(b"enough")
            sending = asyncio.create_task(send_on(conversation))
            assert [message.data async for message in conversation] == [b"hguone"]
            with pytest.raises(BadGatewayError, match="the conversation has ended"):
                await sending
    await still_well(client)


async def test_errors_keep_their_code_in_every_call(serve: Serve) -> None:
    client, engine = await serve()
    for name, attempt in every_call(client).items():
        engine.failing = {name: EngineNotInstalledError("install it")}
        with pytest.raises(PreconditionError, match=r"^install it$"):
            await attempt


async def test_error_message_that_is_not_unicode_is_sent(serve: Serve) -> None:
    """A path in no known encoding, or half a surrogate pair in llama.cpp's own words."""
    client, engine = await serve()
    odd = InvalidRequestError("model: \udcff \ud800 is odd")
    engine.failing = {"call": odd, "stream": odd, "pull_model": odd}
    with pytest.raises(InvalidRequestError, match=r"^model: \? \? is odd$"):
        await client.invoke("chat", HELLO)
    async with client.stream("chat", HELLO) as chunks:
        with pytest.raises(InvalidRequestError, match="is odd"):
            await anext(chunks)
    with pytest.raises(InvalidRequestError, match="is odd"):
        async for _ in client.pull_model_stream("m"):
            pass


async def test_pull_streams_progress_and_success(serve: Serve) -> None:
    client, engine = await serve()
    done = await client.pull_model("m")
    assert (done["status"], done["digest"], done["total"], done["completed"]) == ("success", "sha256:0", 2, 2)
    steps = [step["status"] async for step in client.pull_model_stream("m")]
    assert steps == ["downloading", "success"]
    with pytest.raises(EnginePluginError, match="the pull ended without a result"):
        await client.pull_model("endless")
    with pytest.raises(PullError, match="ended the pull of endless before it was complete"):
        async for _ in client.pull_model_stream("endless"):
            pass
    engine.failing = {"pull_model": PullError("no such host")}
    answers = [part async for part in client.call_json("PullModelStream", {"request_json": {"model": "m"}})]
    first, last = answers
    assert (first.get("code", 0), first["data"]) == (0, {"error": "no such host"})
    assert (last["code"], last["message"]) == (500, "no such host")
    assert last["data"]["status"] == "error: no such host"


async def test_unload_of_several_models_reports_the_first_failure_at_the_end(serve: Serve) -> None:
    client, engine = await serve()
    unloaded: list[str] = []

    async def unload(name: str) -> None:
        if name == "absent":
            raise PreconditionError("models: absent is not loaded")
        await asyncio.sleep(0)
        unloaded.append(name)

    engine.unload_model = unload  # type: ignore[method-assign]  # this one engine's
    with pytest.raises(PreconditionError, match="absent is not loaded"):
        await client.unload_model("absent", "a", "b")
    assert unloaded == ["a", "b"]
