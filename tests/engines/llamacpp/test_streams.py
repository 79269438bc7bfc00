"""Streams: whole events, their end or error, and slow hosts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from engine_plugin.errors import BadGatewayError, InvalidRequestError
from engine_plugin.host import ChunkStream, events
from engine_plugin.host.link import SERVICE
from engine_plugin.protocol.stubs import provider_pb2 as pb
from tests.patience import LIMIT

from .running import ENDLESS, HELLO, RunningPlugin, eventually

if TYPE_CHECKING:
    from .conftest import Serve

STEADY: dict[str, Any] = {"temperature": 0, "seed": 1, "cache_prompt": False}


async def messages(running: RunningPlugin, service: str, request: bytes) -> list[pb.InvokeServiceStreamResponse]:
    """The messages of a streamed answer on the wire."""
    wanted = pb.InvokeServiceRequest(service_name=service, request_data=request)
    found = []
    async with running.link() as link:
        call = link.begin(SERVICE.methods_by_name["InvokeServiceStream"], wanted, timeout=LIMIT)
        while (message := await call.read()) is not None:
            found.append(message)
    return found


def contents(chunk: bytes) -> int:
    """The number of events in a chunk."""
    return chunk.count(b"\n\ndata: ") + chunk.startswith(b"data: ")


@pytest.mark.asyncio(loop_scope="module")
class TestShared:
    """On a shared plugin."""

    @pytest.mark.promise("P25")
    async def test_chunks_end_where_events_end(self, shared: RunningPlugin) -> None:
        parts = await messages(
            shared,
            "chat",
            b'{"messages":[{"role":"user","content":"Hello"}],"stream_options":{"include_usage":true}}',
        )
        *chunks, last = parts
        assert all(part.code == 200 and not part.is_final for part in chunks)
        assert (last.code, last.is_final, last.chunk_data) == (200, True, b"")
        assert all(part.chunk_data.startswith(b"data: ") for part in chunks)
        assert all(part.chunk_data.endswith(b"\n\n") for part in chunks)
        assert chunks[-1].chunk_data.endswith(b"data: [DONE]\n\n")
        assert b'"usage":{' in b"".join(part.chunk_data for part in chunks)

    async def test_stream_has_the_text_of_a_unary_call(self, shared: RunningPlugin) -> None:
        whole = await shared.client.invoke("chat", HELLO | STEADY)
        async with shared.client.stream("chat", HELLO | STEADY) as chunks:
            steps = [event async for event in events(chunks)]
        text = "".join(step["choices"][0]["delta"].get("content") or "" for step in steps)
        assert text == whole["choices"][0]["message"]["content"]
        assert all(step["object"] == "chat.completion.chunk" for step in steps)
        assert "usage" not in steps[-1]

    async def test_list_of_prompts_is_streamed(self, shared: RunningPlugin) -> None:
        request = STEADY | {"prompt": ["Once", "upon a", "time"], "max_tokens": 8}
        whole = await shared.client.invoke("generate", request)
        texts: dict[int, str] = {}
        async with shared.client.stream("generate", request) as chunks:
            async for event in events(chunks):
                for choice in event["choices"]:
                    texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        assert texts == {choice["index"]: choice["text"] for choice in whole["choices"]}

    @pytest.mark.parametrize(
        ("service", "request_"),
        [
            ("generate", b'{"prompt":"' + b"word " * 7000 + b'"}'),
            ("chat", b'{"messages":[{"role":"user","content":"' + b"word " * 7000 + b'"}]}'),
        ],
    )
    async def test_too_long_request_is_rejected_before_the_first_chunk(
        self, shared: RunningPlugin, service: str, request_: bytes
    ) -> None:
        [only] = await messages(shared, service, request_)
        assert (only.code, only.is_final, only.chunk_data) == (400, True, b"")
        assert only.message.startswith("request_data: ")
        assert "engine.context_length in plugin.yaml" in only.message

    async def test_invalid_request_is_answered_with_one_message(self, shared: RunningPlugin) -> None:
        [only] = await messages(shared, "chat", b'{"messages":[]}')
        assert (only.code, only.is_final) == (400, True)
        assert only.message.startswith("messages: ")


async def read_all(stream: ChunkStream) -> list[bytes]:
    return [chunk async for chunk in stream]


@pytest.mark.promise("P9")
async def test_slow_host_gets_the_complete_stream(serve: Serve) -> None:
    running = await serve()
    model = ENDLESS.stem
    request = STEADY | {"prompt": "a", "model": model, "max_tokens": 700}
    async with running.client.stream("generate", request) as stream:
        first = await anext(stream)
        await running.until_idle(model)  # the engine finishes before the host reads on
        rest = await read_all(stream)
    whole = first + b"".join(rest)
    assert whole.endswith(b"data: [DONE]\n\n")
    assert contents(whole) >= 700


async def rests(process: psutil.Process) -> bool:
    """Whether a process is idle for a moment."""
    before = process.cpu_times()
    await asyncio.sleep(0.2)
    return process.cpu_times() == before


async def test_unread_events_are_joined_to_few_chunks(serve: Serve) -> None:
    running = await serve()
    model = ENDLESS.stem
    request = json.dumps(STEADY | {"prompt": "a", "model": model, "max_tokens": 700}).encode()
    async with running.plugin.stream("generate", request) as chunks:
        first = await anext(chunks)
        pid = await running.engine_pid(model)
        await running.until_idle(model)
        await eventually(lambda: rests(psutil.Process(pid)), 30)  # it may still write what it has computed
        rest = [chunk async for chunk in chunks]
    assert all(chunk.endswith(b"\n\n") for chunk in rest)
    count = contents(first + b"".join(rest))
    assert count >= 700
    assert len(rest) <= count / 20, f"{count} events came in {len(rest)} chunks"


@pytest.mark.promise("F20", "P5")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signal")
async def test_death_of_the_engine_ends_its_streams_and_the_next_call_shares_the_restart(serve: Serve) -> None:
    running = await serve()
    model = ENDLESS.stem
    request = STEADY | {"prompt": "a", "model": model, "max_tokens": 100_000}
    brief = request | {"max_tokens": 3}
    victims = []

    async def read_on_too_late() -> None:
        async with running.plugin.stream("generate", json.dumps(request).encode()) as idle:
            await anext(idle)
            victims.append(await running.engine_pid(model))
            async with running.client.stream("generate", request) as read:
                await anext(read)
                os.kill(victims[0], signal.SIGKILL)
                with pytest.raises(BadGatewayError, match=rf"llama.cpp for {model} died: SIGKILL \(exit code -9\)"):
                    await read_all(read)
            # `idle` still holds the dead engine when the next call comes.
            assert await running.loaded() == []
            words = f"degraded: {model} is being restarted: llama.cpp for {model} died: SIGKILL"
            assert (await running.client.health_check()).startswith(words)
            assert (await running.client.invoke("generate", brief))["usage"]["completion_tokens"] == 3
            assert await running.loaded() == [model]
            assert await running.engine_pid(model) != victims[0]
            async for _ in idle:
                pass

    with pytest.raises(BadGatewayError, match="SIGKILL"):
        await read_on_too_late()
    # The call that failed with the old engine has not stopped the new one.
    assert (await running.client.invoke("generate", brief))["choices"]
    assert len(running.servers()) == 1


@pytest.mark.promise("P5")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signal")
async def test_death_of_the_engine_ends_a_unary_call(serve: Serve) -> None:
    running = await serve()
    model = ENDLESS.stem
    await running.client.load_model(model)
    asking = asyncio.create_task(running.client.invoke("generate", {"prompt": "a", "model": model, "n_predict": -1}))
    await running.until_busy(model)
    os.kill(await running.engine_pid(model), signal.SIGKILL)
    with pytest.raises(BadGatewayError, match="died: SIGKILL"):
        await asking
    assert await running.loaded() == []


async def test_error_inside_a_stream_follows_the_text_before_it(serve: Serve) -> None:
    """The answer exceeds the small context while it streams."""
    running = await serve(context_length=128)
    model = ENDLESS.stem
    asked = b'{"prompt":"a","model":"%s","n_predict":-1,"ignore_eos":true}' % model.encode()
    *chunks, last = await messages(running, "generate", asked)
    assert chunks
    assert last.is_final
    assert last.code in (200, 400)
    if last.code == 400:  # llama.cpp may also end such an answer by itself
        assert "context" in last.message


async def test_prompt_beyond_the_context_is_rejected(serve: Serve) -> None:
    running = await serve(context_length=128)
    with pytest.raises(InvalidRequestError, match=r"engine\.context_length.* Shorten the request"):
        await running.client.invoke("generate", {"prompt": "word " * 200})
