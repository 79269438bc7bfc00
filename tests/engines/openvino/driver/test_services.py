"""All eight services through the plugin, on the embedded server with the samples."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest

from engine_plugin.errors import EnginePluginError, InvalidRequestError, NotFoundError, UnsupportedError
from engine_plugin.host import events
from engine_plugin.system.files import in_thread
from tests.patience import LIMIT

from .running import COUNT, ONE_STEP, SERVICES, RunningEngine, tone

pytestmark = pytest.mark.asyncio(loop_scope="module")

_GOOD: dict[str, dict[str, Any]] = {
    "chat": COUNT,
    "generate": {"prompt": "count"},
    "embed": {"input": "a"},
    "rerank": {"query": "a", "documents": ["a"]},
    "text-to-image": {"prompt": "a", "size": "64x64", "num_inference_steps": 1},
    "speech-to-text": {"audio": tone(0.2)},
    "text-to-speech": {"text": "a"},
}
"""A request that each service answers."""


async def test_chat_is_answered(shared: RunningEngine) -> None:
    answer = await shared.client.invoke("chat", COUNT)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"].startswith("one two three")
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] > 0
    assert answer["model"] == "tiny-chat"


async def test_chat_is_streamed(shared: RunningEngine) -> None:
    whole = (await shared.client.invoke("chat", COUNT))["choices"][0]["message"]["content"]
    request = {**COUNT, "stream_options": {"include_usage": True}}
    async with shared.client.stream("chat", request) as chunks:
        told = [event async for event in events(chunks)]
    assert all(event["object"] == "chat.completion.chunk" for event in told)
    pieces = [choice["delta"].get("content") or "" for event in told for choice in event["choices"]]
    assert "".join(pieces) == whole
    assert told[-1]["usage"]["completion_tokens"] > 0


async def test_generate_is_answered(shared: RunningEngine) -> None:
    answer = await shared.client.invoke("generate", {"prompt": ["a", "b"], "max_tokens": 3, "ignore_eos": True})
    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 6
    async with shared.client.stream("generate", {"prompt": "a", "max_tokens": 3}) as chunks:
        told = [event async for event in events(chunks)]
    assert told[-1]["choices"][0]["finish_reason"]


async def test_embed_is_answered(shared: RunningEngine) -> None:
    answer = await shared.client.invoke("embed", {"input": ["a", "b", "a"]})
    vectors = [entry["embedding"] for entry in answer["data"]]
    assert [len(vector) for vector in vectors] == [32, 32, 32]
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-3)
    assert vectors[0] != vectors[1]


async def test_rerank_is_answered(shared: RunningEngine) -> None:
    request = {"query": "a", "documents": ["b", {"text": "c"}, "d"], "top_n": 2, "return_documents": True}
    results = (await shared.client.invoke("rerank", request))["results"]
    scores = [result["relevance_score"] for result in results]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert {result["document"]["text"] for result in results} <= {"b", "c", "d"}


async def test_picture_is_generated(shared: RunningEngine) -> None:
    """With the host's format of a size, and OpenAI's name of a seed."""
    request = {"prompt": "a", "size": "64*32", "num_inference_steps": 2}
    first = await shared.client.invoke("text-to-image", {**request, "seed": 5})
    [picture] = [base64.b64decode(entry["b64_json"]) for entry in first["data"]]
    assert picture.startswith(b"\x89PNG")
    assert (int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24])) == (64, 32)
    again = await shared.client.invoke("text-to-image", {**request, "rng_seed": 5})
    assert again["data"] == first["data"]
    other = await shared.client.invoke("text-to-image", {**request, "rng_seed": 6})
    assert other["data"] != first["data"]


async def test_picture_is_streamed_with_progress(shared: RunningEngine) -> None:
    async with shared.client.stream("text-to-image", {**ONE_STEP, "num_inference_steps": 3}) as chunks:
        told = [event async for event in events(chunks)]
    assert [event.get("step") for event in told] == [1, 2, 3, None]
    assert told[-1]["type"] == "image_generation.completed"
    assert base64.b64decode(told[-1]["data"][0]["b64_json"]).startswith(b"\x89PNG")


async def test_speech_is_generated_and_transcribed(shared: RunningEngine) -> None:
    spoken = await shared.client.invoke("text-to-speech", {"text": "hello"})
    sound = base64.b64decode(spoken["audio"])
    assert sound.startswith(b"RIFF")
    place = Path(spoken["url"])
    assert place.parent == shared.engine.manifest.data_dir / "output"
    assert await in_thread(place.read_bytes) == sound
    heard = await shared.client.invoke(
        "speech-to-text", {"audio": spoken["audio"], "response_format": "verbose_json"}
    )
    assert heard["model"] == "tiny-transcribe"
    assert heard["duration"] == pytest.approx(spoken["duration"], abs=0.1)
    assert isinstance(heard["segments"], list)


async def test_live_stream_is_transcribed(shared: RunningEngine) -> None:
    sound = base64.b64decode(tone(1.5))[44:]
    async with asyncio.timeout(LIMIT), shared.client.invoke_bidi("speech-to-text-ws") as talk:
        await talk.send(sound, metadata={"format": "pcm", "sample_rate": "16000"})
        await talk.send('{"action": "finish-task"}')
        told = [json.loads(message.data)["header"]["event"] async for message in talk]
    assert (told[0], told[-1]) == ("task-started", "task-finished")


@pytest.mark.parametrize("service", [name for name in SERVICES if name != "speech-to-text-ws"])
async def test_model_of_another_kind_is_rejected(shared: RunningEngine, service: str) -> None:
    wrong = "tiny-embed" if SERVICES[service] != "tiny-embed" else "tiny-chat"
    with pytest.raises(InvalidRequestError, match=rf"model: {wrong} is a model for .*; {service} needs one for "):
        await shared.client.invoke(service, {**_GOOD[service], "model": wrong})


async def test_live_stream_with_a_model_of_another_kind_fails(shared: RunningEngine) -> None:
    async with asyncio.timeout(LIMIT), shared.client.invoke_bidi("speech-to-text-ws") as talk:
        await talk.send(bytes(320), metadata={"model": "tiny-chat"})
        await talk.done_sending()
        with pytest.raises(InvalidRequestError, match="tiny-chat is a model for chat"):
            [message async for message in talk]


@pytest.mark.parametrize("service", [name for name in SERVICES if name != "speech-to-text-ws"])
async def test_missing_model_is_reported(shared: RunningEngine, service: str) -> None:
    with pytest.raises(NotFoundError, match="owner/nothing"):
        await shared.client.invoke(service, {**_GOOD[service], "model": "owner/nothing"})


@pytest.mark.parametrize(
    ("size", "complaint"),
    [
        ("100x64", "multiples of 8, as in 96x64, not 100x64"),
        ("64*4", "multiples of 8"),
        ("8192x64", "8192x64 is more than 4096x4096, which engine.image.max_resolution"),
    ],
)
async def test_invalid_size_is_rejected(shared: RunningEngine, size: str, complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"size: .*{complaint}"):
        await shared.client.invoke("text-to-image", {"prompt": "a", "size": size})


async def test_prompt_beyond_the_context_is_rejected(shared: RunningEngine) -> None:
    request = {"messages": [{"role": "user", "content": "count " * 3000}]}
    with pytest.raises(InvalidRequestError, match="Shorten the request, or take a model with more context"):
        await shared.client.invoke("chat", request)
    with pytest.raises(InvalidRequestError, match="Shorten the request"):
        async with shared.client.stream("chat", request) as chunks:
            [event async for event in events(chunks)]


async def test_error_of_the_server_is_raised(shared: RunningEngine) -> None:
    with pytest.raises(InvalidRequestError, match=r"^(request_data: the engine refuses it: .*)?temperature"):
        await shared.client.invoke("chat", {**COUNT, "temperature": "hot"})


@pytest.mark.parametrize("service", ["embed", "rerank", "speech-to-text", "text-to-speech"])
async def test_other_services_do_not_stream(shared: RunningEngine, service: str) -> None:
    with pytest.raises(UnsupportedError):
        async with shared.client.stream(service, _GOOD[service]) as chunks:
            [chunk async for chunk in chunks]
    with pytest.raises(UnsupportedError, match="Call InvokeService"):
        async with shared.engine.stream(service, {**_GOOD[service], "model": SERVICES[service]}) as chunks:
            [chunk async for chunk in chunks]


async def test_concurrent_calls_are_answered(shared: RunningEngine) -> None:
    async def ask(service: str) -> dict[str, Any] | EnginePluginError:
        return await shared.client.invoke(service, _GOOD[service])

    answers = await asyncio.gather(*(ask(service) for service in list(_GOOD) * 3))
    assert len(answers) == 3 * len(_GOOD)


async def test_health_and_configuration_are_reported(shared: RunningEngine) -> None:
    assert await shared.client.health_check() == "ready: 6 models loaded"
    assert await shared.loaded() == sorted(set(SERVICES.values()))
    assert (await shared.client.get_version()).startswith("20")


async def test_each_service_has_a_default_model(shared: RunningEngine) -> None:
    assert {service: await shared.engine.default_model(service) for service in SERVICES} == SERVICES
    assert await shared.engine.default_model("sing") == ""
