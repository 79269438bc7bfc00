"""Calls that are cancelled, wait, have a slow client, or lose their worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from engine_plugin.process import memory
from openvino_server.link import Worker
from tests.engines.llamacpp.running import eventually
from tests.patience import LIMIT

if TYPE_CHECKING:
    from tests.openvino_server.serving.conftest import Front, Serve

HELD = {"parts": [[0, "a", 1, None, None]], "then": "hold"}


async def first_bytes(front: Front, stack: contextlib.AsyncExitStack, **script: object) -> None:
    """A stream of which the first event has come."""
    response = await stack.enter_async_context(front.streaming(script=script or HELD))
    await asyncio.wait_for(response.content.readany(), LIMIT)


async def until_owed(front: Front) -> None:
    """The worker has a call to answer."""
    async with front.registry.models["m"].use() as worker:
        await eventually(lambda: worker.owes)


async def until_cancelled(front: Front, count: int = 1) -> None:
    """The worker has been told of as many cancels."""
    async with asyncio.timeout(LIMIT):
        while len(await front.cancelled()) < count:
            pass


async def test_disconnect_during_a_stream_cancels_the_call(serve: Serve) -> None:
    front = await serve()
    async with contextlib.AsyncExitStack() as stack:
        await first_bytes(front, stack)
        assert await front.cancelled() == []
    await until_cancelled(front)


async def test_disconnect_before_the_answer_cancels_the_call(serve: Serve) -> None:
    front = await serve()
    for stream in (False, True):
        call = asyncio.create_task(front.chat(stream=stream, script={"parts": [], "then": "hold"}))
        await until_owed(front)
        call.cancel()
        await asyncio.wait({call})
        await until_cancelled(front, 1 + stream)


async def test_calls_beyond_the_queue_are_rejected_and_the_others_answered(serve: Serve) -> None:
    front = await serve(empty=True, max_queue=1)
    front.config.add("m", options={"max_num_seqs": 1})
    assert await front.reload() == 201
    async with contextlib.AsyncExitStack() as stack:
        await first_bytes(front, stack)
        await first_bytes(front, stack)
        status, answer = await front.chat()
        assert (status, answer["error"]["type"]) == (503, "unavailable_error")
    async with asyncio.timeout(LIMIT):
        while (await front.chat())[0] != 200:
            pass


@pytest.mark.parametrize("then", ["crash", "noise", "class"])
async def test_worker_that_dies_or_writes_invalid_frames_fails_its_calls_and_is_restarted(
    serve: Serve, then: str
) -> None:
    front = await serve(restart_backoff=0.01)
    async with contextlib.AsyncExitStack() as stack:
        held = await stack.enter_async_context(front.streaming(script=HELD))
        await asyncio.wait_for(held.content.readany(), LIMIT)
        status, answer = await front.chat(script={"parts": [], "then": then})
        assert status == 500
        assert "process of model m ended" in answer["error"]["message"]
        if then == "crash":
            assert "exit status 11" in answer["error"]["message"]
            assert "Segmentation fault, nearly" in answer["error"]["message"]
        assert json.loads((await held.content.read()).decode().strip().removeprefix("data: "))["error"]["code"] == 500
    assert (await front.chat())[0] == 200  # waits for the new one


async def test_worker_that_closes_its_output_is_killed(serve: Serve) -> None:
    front = await serve(hung_timeout=0, restart_backoff=0.01)
    status, answer = await asyncio.wait_for(front.chat(script={"parts": [], "then": "mute"}), LIMIT)
    assert status == 500
    assert answer["error"]["message"].startswith("the process of model m ended: SIGKILL")
    assert (await front.chat())[0] == 200


async def test_calls_fail_before_the_last_attempt_to_kill_a_worker_ends(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process in an uninterruptible system call survives SIGKILL for as long as the call lasts."""
    front = await serve(drain_timeout=0, hung_timeout=0)
    kill, dies = Worker.kill, asyncio.Event()

    async def kill_later(worker: Worker) -> bool:
        await dies.wait()
        return await kill(worker)

    monkeypatch.setattr(Worker, "kill_now", lambda _worker: None)
    monkeypatch.setattr(Worker, "kill", kill_later)
    async with front.streaming(script=HELD) as held:
        await asyncio.wait_for(held.content.readany(), LIMIT)
        front.config.models.clear()
        leaving = asyncio.create_task(front.reload())
        try:
            last = await asyncio.wait_for(held.content.read(), LIMIT)
            assert not leaving.done()
        finally:
            dies.set()
            assert await asyncio.wait_for(leaving, LIMIT) == 201
    assert json.loads(last.decode().removeprefix("data: "))["error"]["message"] == "model m was unloaded"


@pytest.mark.promise("U8")
@pytest.mark.parametrize(("before", "after"), [(7, 8), (8, 8)])
async def test_worker_killed_for_lack_of_memory_is_reported_as_such(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    """The system counts such kills, which distinguishes them from other SIGKILLs."""
    count = before
    monkeypatch.setattr(memory, "kills", lambda: count)
    front = await serve(restart_backoff=0.01)
    async with front.registry.models["m"].use() as worker:
        count = after
        worker.kill_now()
        await asyncio.wait_for(worker.over.wait(), LIMIT)
    lack = re.search(
        r"SIGKILL.*\. It was ended for lack of memory: \S+ [MGT]iB of the \w+'s \S+ [MGT]iB are free.*smaller model",
        worker.ended_because,
    )
    assert bool(lack) is (after > before), worker.ended_because


async def test_death_of_a_worker_does_not_affect_other_models(serve: Serve) -> None:
    front = await serve(restart_backoff=30.0)
    front.config.add("other")
    assert await front.reload() == 201
    async with contextlib.AsyncExitStack() as stack:
        held = await stack.enter_async_context(front.streaming(model="other", script=HELD))
        await asyncio.wait_for(held.content.readany(), LIMIT)
        assert (await front.chat(script={"then": "crash"}))[0] == 500
        assert (await front.get("/v2/health/ready"))[0] == 503
        assert (await front.state("m"))[0] == "LOADING"
        assert (await front.chat(model="other", script={"release": True}))[0] == 200
        assert (await asyncio.wait_for(held.content.read(), LIMIT)).endswith(b"data: [DONE]\n\n")


async def test_worker_that_dies_repeatedly_is_not_restarted(serve: Serve) -> None:
    front = await serve(restart_limit=2, restart_backoff=0.01)
    for _ in range(3):
        assert (await front.settled())[0] == "AVAILABLE"
        assert (await front.chat(script={"then": "crash"}))[0] == 500
    state, reason = await front.settled()
    assert state == "END"
    assert "3 times in a row" in reason
    status, answer = await front.chat()
    assert status == 503
    assert "3 times in a row" in answer["error"]["message"]
    assert (await front.get("/v2/health/ready"))[0] == 200  # none is to be there
    assert await front.reload() == 201
    assert (await front.chat())[0] == 200


async def test_death_after_the_stable_time_counts_as_the_first(serve: Serve) -> None:
    front = await serve(restart_limit=1, restart_backoff=0.01, stable_time=0.0)
    for _ in range(4):
        assert (await front.chat(script={"then": "crash"}))[0] == 500
    assert (await front.chat())[0] == 200


async def test_stalled_client_uses_bounded_memory_and_delays_no_other(serve: Serve) -> None:
    front = await serve()
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user"}], "stream": True, "script": {"parts": [], "then": "flood"}}
    )
    head = (
        f"POST /v3/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a-key\r\nContent-Length: {len(body)}"
    )
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.setblocking(False)
        loop = asyncio.get_running_loop()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await loop.sock_connect(stopped, front.address.removeprefix("unix:"))
        await loop.sock_sendall(stopped, f"{head}\r\n\r\n{body}".encode())
        *_, end = await front.events(script={"parts": [[0, "b", 1, None, None]] * 50})
        assert end == "[DONE]"
        await until_cancelled(front)  # it has left more unread than is kept
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


async def test_slow_client_gets_the_complete_stream(serve: Serve) -> None:
    front = await serve()
    sent = [(index % 2, f"{index:06d}" * 40) for index in range(3000)]
    parts = [[index, text, 1, None, None] for index, text in sent]
    async with front.streaming(script={"parts": parts}) as response:
        assert (await front.chat())[0] == 200  # the worker has sent all of it
        texts: dict[int, str] = {0: "", 1: ""}
        for line in (await asyncio.wait_for(response.read(), LIMIT)).decode().split("\n\n"):
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {index: "".join(text for place, text in sent if place == index) for index in (0, 1)}


async def test_concurrent_streams_are_not_mixed(serve: Serve) -> None:
    front = await serve()

    async def one(word: str) -> str:
        *chunks, end = await front.events(script={"parts": [[0, word, 1, None, None]] * 20})
        assert end == "[DONE]"
        return "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)

    words = [f"<{number}>" for number in range(32)]
    assert await asyncio.gather(*map(one, words)) == [word * 20 for word in words]


async def test_malformed_answer_ends_only_its_stream(serve: Serve) -> None:
    front = await serve()
    async with contextlib.AsyncExitStack() as stack:
        held = await stack.enter_async_context(front.streaming(script=HELD))
        await asyncio.wait_for(held.content.readany(), LIMIT)
        *_, last = await front.events(script={"parts": [[0, "a", 1, None, None], [0]], "then": "hold"})
        assert last["error"]["code"] == 500
        assert (await front.chat(script={"release": True}))[0] == 200
        assert (await asyncio.wait_for(held.content.read(), LIMIT)).endswith(b"data: [DONE]\n\n")


async def test_frames_for_an_ended_call_are_dropped(serve: Serve) -> None:
    front = await serve()
    async with contextlib.AsyncExitStack() as stack:
        await first_bytes(front, stack, parts=[], then="flood")
    await until_cancelled(front)
    async with front.registry.models["m"].use() as worker:
        assert not worker.owes
