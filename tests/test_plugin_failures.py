"""Errors of the engine, as the host gets them from the plugin."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import (
    BadGatewayError,
    EngineNotInstalledError,
    EnginePluginError,
    InvalidRequestError,
    PreconditionError,
    PullError,
)
from engine_plugin.server import servicer
from tests.patience import LIMIT, NEVER
from tests.served_plugin import HELLO, Serve, still_well

from .host.conftest import sockets as sockets  # noqa: PLC0414  # a fixture
from .served_plugin import serve as serve  # noqa: PLC0414  # a fixture

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from engine_plugin.host import BidiCall, PluginClient


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
