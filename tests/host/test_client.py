"""Every rpc has a method, and every failure raises an EnginePluginError."""

from __future__ import annotations

import asyncio
import gc
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest

from engine_plugin import host
from engine_plugin.errors import (
    AuthError,
    BadGatewayError,
    DeadlineError,
    EnginePluginError,
    InvalidRequestError,
    NotFoundError,
    PluginProcessError,
    PullError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.host import OperateStatus, events
from engine_plugin.host.link import SERVICE
from engine_plugin.rpc.http2 import Stream
from tests.patience import LIMIT

if TYPE_CHECKING:
    from engine_plugin.host import BidiCall, PluginClient

    from .conftest import Launch


def test_all_lists_the_exported_names() -> None:
    public = {
        name
        for name, value in vars(host).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("engine_plugin.")
    }
    assert sorted(host.__all__) == sorted(public)
    assert list(host.__all__) == sorted(host.__all__)


async def test_every_rpc_has_a_method(launch_fake: Launch) -> None:
    async with await launch_fake() as plugin:
        assert await plugin.get_manifest() == {"provider": {"name": "fake"}}
        assert (await plugin.invoke("chat", {"a": 1}, auth="k"))["auth"] == "k"
        assert b'"request": {"a": 2}' in await plugin.invoke_raw("chat", b'{"a":2}')
        async with plugin.stream("chat", {}) as chunks:
            assert [event["choices"][0]["delta"]["content"] async for event in events(chunks)] == ["Hel", "lo"]
            assert chunks.metadata == {"flavor": "openai"}
        async with plugin.invoke_bidi("speech") as conversation:
            await conversation.send(b"abc", metadata={"rate": "16000"})
            await conversation.send("def")
            await conversation.done_sending()
            answers = [answer async for answer in conversation]
        assert [(a.data, a.type, a.metadata["first"]) for a in answers] == [
            (b"cba", "binary", "True"),
            (b"fed", "text", "False"),
        ]
        assert answers[0].metadata["rate"] == "16000"
        with pytest.raises(UnavailableError, match="the engine is not running"):
            await plugin.health_check()
        await plugin.start_engine()
        assert await plugin.health_check() == "ready"
        assert await plugin.get_operate_status() is OperateStatus.RUNNING
        await plugin.set_operate_status(OperateStatus.ERROR)
        assert await plugin.get_operate_status() is OperateStatus.ERROR
        await plugin.stop_engine()
        with pytest.raises(AuthError, match="no key"):
            await plugin.validate_auth()
        await plugin.set_auth("apikey", {"key": "secret"})
        await plugin.validate_auth()
        with pytest.raises(UnsupportedError):
            await plugin.refresh_auth()
        assert (await plugin.get_config())["device_type"] == "cpu"
        check = await plugin.check_engine()
        assert check
        assert check.detail == "fake 1.2.3"
        assert await plugin.install_engine(cover=True) == "fake 1.2.3 cover=True"
        await plugin.init_env()
        assert await plugin.upgrade_engine() == "fake 1.2.4"
        assert await plugin.get_version() == "1.2.3"
        assert (await plugin.pull_model("tiny"))["total"] == 3
        async with aclosing(plugin.pull_model_stream("tiny", sha256="ab", insecure=True)) as pull:
            steps = [step async for step in pull]
        assert steps[0]["status"] == 'asked {"insecure": true, "model": "tiny", "sha256": "ab", "stream": true}'
        assert [step["status"] for step in steps[1:]] == ["downloading", "success"]
        assert [model["name"] for model in await plugin.list_models()] == ["tiny"]
        await plugin.load_model("tiny")
        await plugin.load_model("small")
        assert [model["name"] for model in await plugin.running_models()] == ["tiny", "small"]
        await plugin.unload_model("tiny", "small")
        assert await plugin.running_models() == []
        await plugin.delete_model("tiny")
        called = set((await plugin.invoke("calls", {}))["calls"])
    assert called == {rpc.name for rpc in SERVICE.methods}


@pytest.mark.parametrize(
    ("service", "request_", "error", "text"),
    [
        ("error", {"code": 404, "message": "no such model"}, NotFoundError, "no such model"),
        ("error", {"code": 418, "message": ""}, EnginePluginError, "answered with code 418"),
        ("status", {"status": "DEADLINE_EXCEEDED", "message": "60 s"}, DeadlineError, "did not answer in time: 60 s"),
        ("status", {"status": "UNAVAILABLE", "message": "busy"}, UnavailableError, "busy"),
        ("status", {"status": "ABORTED", "message": "broke off"}, BadGatewayError, "broke off"),
        ("status", {"status": "INTERNAL", "message": "bug"}, EnginePluginError, "bug"),
        ("not-json", {}, BadGatewayError, "not a JSON object"),
    ],
)
async def test_error_codes_raise_their_classes(
    launch_fake: Launch, service: str, request_: dict[str, Any], error: type[Exception], text: str
) -> None:
    async with await launch_fake() as plugin:
        with pytest.raises(error, match=text) as raised:
            await plugin.invoke(service, request_)
        assert type(raised.value) is error


async def test_deadline_of_the_caller_ends_the_call(launch_fake: Launch) -> None:
    async with await launch_fake() as plugin:
        with pytest.raises(DeadlineError):
            await plugin.invoke("hang", {}, timeout=0.2)
        async with plugin.stream("chat", {"then": "hang"}, timeout=0.5) as chunks:
            with pytest.raises(DeadlineError):
                [chunk async for chunk in chunks]


@pytest.mark.promise("P5")
async def test_error_names_the_plugin_that_died(launch_fake: Launch) -> None:
    async with await launch_fake() as plugin:
        with pytest.raises(PluginProcessError, match=r"exited with code 9 .*out of cheese"):
            await plugin.invoke("exit", {"code": 9})
        with pytest.raises(PluginProcessError, match="exited with code 9"):
            await plugin.get_version()


async def test_stream_error_names_the_plugin_that_died(launch_fake: Launch) -> None:
    async with await launch_fake() as plugin, plugin.stream("chat", {"then": "hang"}) as chunks:
        assert await anext(chunks)
        assert await anext(chunks)
        # Only now: what a process sends just before it dies may or may not arrive.
        dying = asyncio.ensure_future(plugin.invoke("exit", {"code": 7}))
        with pytest.raises(PluginProcessError, match=r"exited with code 7 .*out of cheese"):
            await anext(chunks)
        with pytest.raises(PluginProcessError, match="exited with code 7"):
            await dying


async def test_waiting_calls_fail_when_the_plugin_is_killed(launch_fake: Launch) -> None:
    async with await launch_fake() as plugin:
        waiting = [
            asyncio.ensure_future(plugin.invoke("hang", {})),
            asyncio.ensure_future(anext(plugin.stream("chat", {"chunks": [], "then": "hang"}))),
        ]
        await plugin.get_version()
        await plugin.kill()
        for call in waiting:
            with pytest.raises(PluginProcessError):
                await call
        with pytest.raises(PluginProcessError, match="was stopped by this host"):
            await plugin.get_version()


@pytest.mark.promise("F23")
async def test_abandoned_stream_is_cancelled_in_the_plugin(launch_fake: Launch) -> None:
    async with await launch_fake() as plugin:
        async with plugin.stream("chat", {"then": "hang"}) as chunks:
            assert await anext(chunks)
        await plugin.invoke("cancelled", {}, timeout=LIMIT)
        assert [chunk async for chunk in chunks] == []


def stream_calls() -> int:
    return sum(isinstance(found, (grpc.aio.UnaryStreamCall, Stream)) for found in gc.get_objects())


async def test_abandoned_stream_is_released_at_once(launch_fake: Launch) -> None:
    """It must not wait for the cycle collector: the call keeps the connection of a closed client open."""
    async with await launch_fake() as plugin:
        gc.collect()
        gc.disable()
        before = stream_calls()
        try:
            async with plugin.stream("chat", {"chunks": ["a"], "then": "hang"}) as chunks:
                assert await anext(chunks)
                assert stream_calls() == before + 1
            del chunks
            await plugin.invoke("cancelled", {}, timeout=LIMIT)
            assert stream_calls() == before
        finally:
            gc.enable()


async def test_stream_closed_by_another_task_ends_without_error(launch_fake: Launch) -> None:
    async with await launch_fake() as plugin:
        stream = plugin.stream("chat", {"chunks": ["a"], "then": "hang"})
        first = asyncio.Event()

        async def read() -> int:
            count = 0
            async for _chunk in stream:
                count += 1
                first.set()
            return count

        reading = asyncio.ensure_future(read())
        await asyncio.wait_for(first.wait(), LIMIT)
        await stream.aclose()
        assert await asyncio.wait_for(reading, LIMIT) == 1


@pytest.mark.parametrize("then", ["error", "abort"])
async def test_error_message_ends_a_stream(launch_fake: Launch, then: str) -> None:
    async with await launch_fake() as plugin, plugin.stream("chat", {"then": then}) as chunks:
        assert await anext(chunks)
        assert await anext(chunks)
        with pytest.raises(BadGatewayError, match="engine broke off"):
            await anext(chunks)
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)


async def test_large_messages_reach_a_slow_reader(launch_fake: Launch) -> None:
    big = "x" * (8 << 20)
    async with await launch_fake() as plugin:
        assert (await plugin.invoke("echo", {"big": big}))["request"]["big"] == big
        async with plugin.stream("chat", {"chunks": [big]}) as chunks:
            assert len(await anext(chunks)) > len(big)


async def test_failed_conversation_raises_its_error(launch_fake: Launch) -> None:
    async with await launch_fake() as plugin, plugin.invoke_bidi("speech") as conversation:
        await conversation.send("refuse")
        assert (await anext(conversation)).data == b"esufer"
        with pytest.raises(EnginePluginError, match="refused"):
            await anext(conversation)


async def send_forever(conversation: BidiCall) -> None:
    async with asyncio.timeout(LIMIT):
        while True:
            await conversation.send("more")


async def test_send_to_a_failed_conversation_raises_its_error(launch_fake: Launch) -> None:
    async with await launch_fake() as plugin, plugin.invoke_bidi("speech") as conversation:
        await conversation.send("refuse")
        with pytest.raises(EnginePluginError):
            await send_forever(conversation)
        assert (await anext(conversation)).data == b"esufer"
        with pytest.raises(EnginePluginError, match="refused"):
            await anext(conversation)


async def test_pull_that_ends_without_success_is_an_error(launch_fake: Launch) -> None:
    async with await launch_fake() as plugin:
        with pytest.raises(PullError, match="before it was complete"):
            [step async for step in plugin.pull_model_stream("broken")]
        with pytest.raises(PullError, match="ended with 'half'"):
            await plugin.pull_model("tiny", source="half")


async def answers(plugin: PluginClient, rpc: str, request: Any) -> list[dict[str, Any]]:
    async with aclosing(plugin.call_json(rpc, request)) as found:
        return [answer async for answer in found]


async def test_rpc_is_called_by_its_name(launch_fake: Launch) -> None:
    async with await launch_fake() as plugin:
        manifest = {"code": 200, "message": "", "manifest_json": {"provider": {"name": "fake"}}}
        assert await answers(plugin, "get_manifest", {}) == [manifest]
        [answer] = await answers(plugin, "InvokeService", {"service_name": "chat", "request_data": {"a": [1]}})
        assert answer["response_data"]["request"] == {"a": [1]}
        assert [a["code"] for a in await answers(plugin, "DeleteModel", {"model": "big"})] == [404]
        assert await answers(plugin, "LoadModel", {"request_json": '{"model": "tiny"}'})
        stream = await answers(plugin, "InvokeServiceStream", {"request_data": {}})
        assert stream[0]["metadata"] == {"flavor": "openai"}
        assert stream[-1]["chunk_data"] == "data: [DONE]\n\n"
        assert stream[-1]["is_final"] is True
        said = await answers(plugin, "InvokeServiceBidi", [{"data": "ab"}, {"data": "cd", "metadata": {"k": "v"}}])
        assert [(a["data"], a["metadata"].get("k")) for a in said] == [("ba", None), ("dc", "v")]


@pytest.mark.parametrize(
    ("rpc", "request_", "text"),
    [
        ("Nonsense", {}, "no rpc is called 'Nonsense'; the rpcs are: GetManifest, "),
        ("StartEngine", {"model": "x"}, "model: StartEngineRequest has no such field; its fields: mode"),
        ("StartEngine", {"mode": 7}, "not a valid StartEngineRequest"),
        ("StartEngine", [{}, {}], "takes one JSON object"),
    ],
)
async def test_json_that_does_not_fit_the_rpc_is_rejected(
    launch_fake: Launch, rpc: str, request_: Any, text: str
) -> None:
    async with await launch_fake() as plugin:
        with pytest.raises(InvalidRequestError, match=text):
            await answers(plugin, rpc, request_)
