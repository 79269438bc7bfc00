"""The services without streams of text: the format of their answers, on the engines that have them."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import NotFoundError, UnsupportedError
from tests.speech.sounds import tone, wav

if TYPE_CHECKING:
    from .world import World

pytestmark = pytest.mark.asyncio(loop_scope="package")

PNG = b"\x89PNG\r\n\x1a\n"


async def answer_of(world: World, service: str, **fields: Any) -> dict[str, Any] | None:
    """Return the answer, or None after checking the error of an engine without the service or a model for it."""
    if world.can(service):
        return await world.plugin.invoke(service, world.request(service, **fields))
    with pytest.raises((UnsupportedError, NotFoundError), match=f"{service}|no model is called 'any'"):
        await world.plugin.invoke(service, {"model": "any", **fields})
    return None


async def embedded(world: World, **fields: Any) -> list[Any]:
    answer = await world.plugin.invoke("embed", world.request("embed", **fields))
    assert answer["object"] == "list"
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    assert answer["usage"]["prompt_tokens"] > 0
    return [entry["embedding"] for entry in answer["data"]]


async def test_embed_returns_vectors_of_equal_length(world: World) -> None:
    first, second, again = await embedded(world, input=["a small text", "something else entirely", "a small text"])
    assert len(first) == len(second) > 1
    assert first != second
    assert all(math.isclose(one, other, abs_tol=1e-4) for one, other in zip(first, again, strict=True))
    [alone] = await embedded(world, input="a small text")
    assert all(math.isclose(one, other, abs_tol=1e-4) for one, other in zip(first, alone, strict=True))


async def test_embed_returns_base64_on_request(world: World) -> None:
    [numbers] = await embedded(world, input="a small text")
    [text] = await embedded(world, input="a small text", encoding_format="base64")
    packed = struct.unpack(f"<{len(numbers)}f", base64.b64decode(text))
    assert all(math.isclose(one, other, abs_tol=1e-4) for one, other in zip(numbers, packed, strict=True))


async def test_rerank_orders_documents(world: World) -> None:
    documents = ["about cats", "about dogs", "about fish"]
    answer = await answer_of(world, "rerank", query="cats", documents=documents, top_n=2)
    if answer is None:
        return
    scores = [hit["relevance_score"] for hit in answer["results"]]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)


async def test_text_to_image_returns_an_image(world: World) -> None:
    answer = await answer_of(world, "text-to-image", prompt="a cat", size="64x64", num_inference_steps=1, seed=1)
    if answer is None:
        return
    [picture] = answer["data"]
    assert base64.b64decode(picture["b64_json"]).startswith(PNG)


async def test_speech_to_text_returns_a_transcript(world: World) -> None:
    audio = base64.b64encode(wav(tone(0.5))).decode()
    answer = await answer_of(world, "speech-to-text", audio=audio)
    if answer is None:
        return
    assert isinstance(answer["text"], str)
    assert answer["model"] == world.model("speech-to-text")
    for segment in answer["segments"]:
        assert 0 <= segment["start"] <= segment["end"] <= 1


async def test_text_to_speech_returns_audio(world: World) -> None:
    answer = await answer_of(world, "text-to-speech", text="Hello")
    if answer is None:
        return
    assert base64.b64decode(answer["audio"])[:4] == b"RIFF"
    assert answer["format"] == "wav"


async def test_live_transcription_sends_events_during_the_audio(world: World) -> None:
    if not world.can("speech-to-text-ws"):
        with pytest.raises((UnsupportedError, NotFoundError), match=r"speech-to-text-ws|no model is called 'any'"):
            await talk(world, "any")
        return
    told = await talk(world, world.model("speech-to-text-ws"))
    assert told[0] == "task-started"
    assert told[-1] == "task-finished"


async def talk(world: World, model: str) -> list[str]:
    """Return the events of a live transcription of half a second."""
    async with world.plugin.invoke_bidi("speech-to-text-ws") as call:
        await call.send(tone(0.5), metadata={"model": model, "format": "pcm", "sample_rate": "16000"})
        await call.send('{"action": "finish-task"}')
        return [json.loads(message.data)["header"]["event"] async for message in call]
