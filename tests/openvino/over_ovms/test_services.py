"""Every service, with a server that is ovms."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.base import BidiMessage, HealthState
from engine_plugin.errors import InvalidRequestError

from .calls import HELLO, LIMIT, call, tone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from engine_plugin.engines.openvino.engine import OpenVinoEngine

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a #! line"),
]


async def test_every_service(shared: OpenVinoEngine) -> None:
    assert (await shared.version()).startswith("2026.3")
    assert (await call(shared, "chat", **HELLO))["choices"][0]["message"]["content"].startswith("one two")
    said = await call(shared, "generate", model="tiny-chat", prompt="a", max_tokens=2)
    assert said["usage"]["completion_tokens"] == 2
    embedded = await call(shared, "embed", model="tiny-embed", input=["a", "b"])
    assert [len(entry["embedding"]) for entry in embedded["data"]] == [32, 32]
    ranked = await call(shared, "rerank", model="tiny-rerank", query="a", documents=["b", "c"])
    assert sorted(entry["index"] for entry in ranked["results"]) == [0, 1]
    drawn = await call(shared, "text-to-image", model="tiny-image", prompt="a", size="64x64", num_inference_steps=2)
    assert base64.b64decode(drawn["data"][0]["b64_json"]).startswith(b"\x89PNG")
    audio = base64.b64encode(tone()).decode()
    assert "text" in await call(shared, "speech-to-text", model="tiny-transcribe", audio=audio)
    spoken = await call(shared, "text-to-speech", model="tiny-speak", text="a")
    assert base64.b64decode(spoken["audio"]).startswith(b"RIFF")
    health = await shared.health()
    assert health.state == HealthState.READY, health.detail


async def test_a_stream_and_one_that_is_left(shared: OpenVinoEngine) -> None:
    async with asyncio.timeout(LIMIT):
        async with shared.stream("chat", dict(HELLO)) as events:
            whole = b"".join([block async for block in events])
        assert whole.rstrip().endswith(b"[DONE]")
        async with shared.stream("chat", {**HELLO, "ignore_eos": True, "max_tokens": 900}) as events:
            await anext(aiter(events))
        assert (await call(shared, "chat", **HELLO))["choices"], "nothing of it is in the way"


async def test_live_transcription(shared: OpenVinoEngine) -> None:
    async def messages() -> AsyncIterator[BidiMessage]:
        how = {"model": "tiny-transcribe", "format": "wav"}
        yield BidiMessage(tone(2.0), "binary", how)
        yield BidiMessage(b'{"action": "finish-task"}')

    async with asyncio.timeout(LIMIT), shared.converse("speech-to-text-ws", messages(), "tiny-transcribe") as answers:
        said = [json.loads(answer.data)["header"]["event"] async for answer in answers]
    assert (said[0], said[-1]) == ("task-started", "task-finished")


async def test_what_it_refuses(shared: OpenVinoEngine) -> None:
    with pytest.raises(InvalidRequestError):
        await call(shared, "chat", model="tiny-chat", messages=[{"role": "user", "content": "a " * 3000}])


async def test_unloaded_and_loaded_again(shared: OpenVinoEngine) -> None:
    for _ in range(2):
        assert (await call(shared, "embed", model="tiny-embed", input="a"))["data"]
        await shared.unload_model("tiny-embed")
        assert "tiny-embed" not in [model.name for model in await shared.running_models()]
