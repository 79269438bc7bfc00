"""The services on several kinds of servers: streams, cancellation, errors and speech."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import (
    BadGatewayError,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.messages import ConversationMessage
from tests.engines.openai.test_servers import HELLO, call, streamed
from tests.patience import LIMIT
from tests.speech.sounds import silence, spoken, wav

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from engine_plugin.plugin import Plugin
    from tests.engines.openai.conftest import Attach, Serve

RECORDING = base64.b64encode(wav(bytes(48_000))).decode()


async def test_stream_is_passed_unchanged(serve: Serve, attach: Attach) -> None:
    server = await serve("vllm")
    server.stream = b'data: {"a":  1}\n\n: a comment\n\ndata: [DONE]\n\n'
    async with attach(server).stream("chat", json.dumps(HELLO).encode()) as chunks:
        assert b"".join([chunk async for chunk in chunks]) == server.stream
    assert server.bodies[0]["stream"] is True


async def test_generate_is_streamed(serve: Serve, attach: Attach) -> None:
    told = await streamed(attach(await serve("vllm")), "generate", prompt="a")
    assert [event["choices"][0]["text"] for event in told] == ["one ", "two"]


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (
            b'data: {"a": 1}\n\ndata: {"error": {"message": "it broke", "trace": "x.py"}}\n\ndata: [DONE]\n\n',
            "it broke",
        ),
        (b'data: {"a": 1}\n\n', "before it was done"),
        (b'data: {"a": 1}\n\ndata: {"b"', "inside an event"),
    ],
)
async def test_failed_stream_raises(serve: Serve, attach: Attach, stream: bytes, words: str) -> None:
    server = await serve("vllm")
    server.stream = stream
    chunks = b""
    with pytest.raises(BadGatewayError, match=words) as caught:  # noqa: PT012  # what came before counts
        async with attach(server).stream("chat", json.dumps(HELLO).encode()) as told:
            async for chunk in told:
                chunks += chunk
    assert chunks == b'data: {"a": 1}\n\n'
    assert "x.py" not in str(caught.value)


async def test_other_services_do_not_stream(serve: Serve, attach: Attach) -> None:
    plugin = attach(await serve("gateway"))
    with pytest.raises(UnsupportedError, match="InvokeService"):
        await streamed(plugin, "text-to-image", prompt="a", model="m")


async def test_request_fields_are_passed_on(serve: Serve, attach: Attach) -> None:
    server = await serve("vllm")
    more = {"top_k": 3, "chat_template_kwargs": {"enable_thinking": False}, "seed": 7}
    await call(attach(server), "chat", **HELLO, **more, keep_alive=None, stream=True)
    assert server.bodies == [{**HELLO, **more, "model": "qwen3-8b"}]


@pytest.mark.promise("F23")
@pytest.mark.parametrize(
    ("maker", "service", "request_"),
    [
        ("gateway", "chat", HELLO),
        ("gateway", "speech-to-text", {"audio": RECORDING}),
        ("llama-server", "chat", HELLO),
        ("llama-server", "generate", {"prompt": "a"}),
    ],
)
async def test_cancelled_call_reaches_the_server(
    serve: Serve, attach: Attach, maker: str, service: str, request_: dict[str, Any]
) -> None:
    server = await serve(maker)
    server.gate.clear()
    plugin = attach(server)
    task = asyncio.create_task(call(plugin, service, **request_))
    async with asyncio.timeout(LIMIT):
        await server.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.cancelled.wait()


@pytest.mark.parametrize("options", [{}, {"assemble": "always"}, {"assemble": "never"}])
@pytest.mark.parametrize("maker", ["llama-server", "gateway"])
async def test_assembled_answer_equals_a_whole_one(
    serve: Serve, attach: Attach, maker: str, options: dict[str, Any]
) -> None:
    server = await serve(maker)
    plugin = attach(server, **options)
    for service, request, text in (("chat", HELLO, "one two"), ("generate", {"prompt": "a"}, "one two")):
        answer = await call(plugin, service, **request)
        [choice] = answer["choices"]
        assert (choice["message"]["content"] if service == "chat" else choice["text"]) == text
        streamed_ = options.get("assemble") == "always" or (maker == "llama-server" and not options)
        assert server.bodies[-1].get("stream") is (True if streamed_ else None)
        assert ("stream_options" in server.bodies[-1]) is streamed_


async def test_whole_answer_is_converted_to_a_stream(serve: Serve, attach: Attach) -> None:
    server = await serve("gateway")
    server.streams = False
    assert (await call(attach(server, assemble="always"), "chat", **HELLO))["model"] == "gpt-x"
    told = await streamed(attach(server), "chat", **HELLO)
    assert told[0]["choices"][0]["delta"]["content"] == "one two"
    server.refusal = (200, {"error": {"message": "no room", "code": 503}})
    with pytest.raises(BadGatewayError, match="no room"):
        await streamed(attach(server), "chat", **HELLO)


async def test_ignored_events_are_dropped(serve: Serve, attach: Attach) -> None:
    server = await serve("llama-server")
    piece = b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n'
    server.stream = piece + b"data: null\n\n" + piece + b"data: [DONE]\n\n"
    assert (await call(attach(server), "generate", prompt="a"))["choices"][0]["text"] == "aa"
    assert len(await streamed(attach(server), "generate", prompt="a")) == 2


@pytest.mark.parametrize(
    ("status", "shape", "error", "words"),
    [
        (400, {"error": {"message": "temperature is wrong"}}, InvalidRequestError, "temperature is wrong"),
        (
            400,
            {"error": {"message": "This model's maximum context length is 10 tokens", "code": 400}},
            InvalidRequestError,
            "Shorten the request",
        ),
        (400, {"error": "too long", "code": "context_length_exceeded"}, InvalidRequestError, "Shorten the request"),
        (429, {"error": {"message": "slow down"}}, UnavailableError, "slow down"),
        (503, {"error": "loading"}, UnavailableError, "loading"),
        (500, "<html><body>oh</body></html>", BadGatewayError, "500"),
    ],
)
async def test_error_of_a_server_is_mapped(
    serve: Serve, attach: Attach, status: int, shape: Any, error: type[Exception], words: str
) -> None:
    server = await serve("vllm")
    server.refusal = (status, shape)
    with pytest.raises(error, match=words):
        await call(attach(server), "chat", **HELLO)


# Speech


async def test_recording_is_transcribed(serve: Serve, attach: Attach) -> None:
    server = await serve("gateway")
    plugin = attach(server)
    answer = await call(plugin, "speech-to-text", audio=RECORDING, language="en", response_format="verbose_json")
    assert (answer["text"], answer["language"], answer["duration"]) == ("one", "english", 1.5)
    assert answer["segments"] == [{"id": 0, "start": 0.0, "end": 0.5, "text": "one"}]
    assert server.paths == ["/v1/audio/transcriptions"]
    assert server.forms[0] == {
        "model": "whisper-1",
        "language": "en",
        "response_format": "verbose_json",
        "timestamp_granularities[]": "segment",
        "file": "audio.wav",
    }
    ogg = base64.b64encode(b"OggS" + bytes(100)).decode()
    await call(plugin, "speech-to-text", audio=ogg, task="translate")
    assert (server.forms[1]["file"], server.paths[1]) == ("audio.ogg", "/v1/audio/translations")


async def test_model_without_segments_returns_text(serve: Serve, attach: Attach) -> None:
    server = await serve("gateway")
    server.refuses_details = True
    plugin = attach(server)
    for _ in range(2):
        answer = await call(plugin, "speech-to-text", audio=RECORDING)
        assert answer["segments"] == [{"id": 0, "start": 0.0, "end": 1.5, "text": "one"}]
    forms = [form["response_format"] for form in server.forms]
    assert forms == ["verbose_json", "json", "json"], "the model is remembered"
    assert "timestamp_granularities[]" not in server.forms[1]


async def test_live_stream_is_transcribed(serve: Serve, attach: Attach) -> None:
    server = await serve("gateway")
    plugin = attach(server)
    sound = silence(0.5) + spoken(0, 6) + silence(1)

    async def messages() -> AsyncIterator[ConversationMessage]:
        yield ConversationMessage(sound, "binary", {"format": "pcm", "sample_rate": "16000"})
        yield ConversationMessage(b'{"action": "finish-task"}')

    told = await _converse(plugin, messages())
    assert (told[0], told[-1]) == ("task-started", "task-finished")
    assert "result-generated" in told
    assert server.forms[0]["model"] == "whisper-1"


async def test_live_model_without_segments_is_remembered_by_its_own_name(serve: Serve, attach: Attach) -> None:
    server = await serve("gateway")
    server.refuses_details = True
    plugin = attach(server)
    sound = silence(0.5) + spoken(0, 6) + silence(1)

    async def messages() -> AsyncIterator[ConversationMessage]:
        settings = {"model": "other", "format": "pcm", "sample_rate": "16000"}
        yield ConversationMessage(sound, "binary", settings)
        yield ConversationMessage(b'{"action": "finish-task"}')

    assert (await _converse(plugin, messages()))[-1] == "task-finished"
    server.forms.clear()
    for model in ("whisper-1", "other"):
        await call(plugin, "speech-to-text", audio=RECORDING, model=model)
    forms = [(form["model"], form["response_format"]) for form in server.forms]
    assert forms == [("whisper-1", "verbose_json"), ("whisper-1", "json"), ("other", "json")]


async def test_missing_live_model_is_reported_by_its_own_name(serve: Serve, attach: Attach) -> None:
    server = await serve("gateway")
    server.refusal = (404, {"error": {"message": "The model `other` does not exist."}})
    plugin = attach(server)

    async def messages() -> AsyncIterator[ConversationMessage]:
        settings = {"model": "other", "format": "pcm", "sample_rate": "16000"}
        yield ConversationMessage(spoken(0, 6) + silence(1), "binary", settings)
        yield ConversationMessage(b'{"action": "finish-task"}')

    with pytest.raises(ModelNotFoundError) as caught:
        await _converse(plugin, messages())
    assert caught.value.model == "other"


async def _converse(plugin: Plugin, messages: AsyncIterator[ConversationMessage]) -> list[str]:
    async with asyncio.timeout(LIMIT), plugin.converse("speech-to-text-ws", messages) as answers:
        return [json.loads(answer.data)["header"]["event"] async for answer in answers]


async def test_speech_is_generated(serve: Serve, attach: Attach) -> None:
    server = await serve("gateway")
    plugin = attach(server, voice="alloy")
    answer = await call(plugin, "text-to-speech", text="hello")
    assert answer["duration"] == 0.1
    assert Path(answer["url"]).parent == plugin.manifest.data_dir / "output"
    assert server.bodies == [{"model": "tts-1", "input": "hello", "voice": "alloy", "response_format": "wav"}]
    await call(plugin, "text-to-speech", text="hello", voice="own")
    assert server.bodies[1]["voice"] == "own"


async def test_missing_speech_endpoint_is_reported(serve: Serve, attach: Attach) -> None:
    plugin = attach(await serve("llama-server"))
    with pytest.raises(UnsupportedError, match="does not support speech-to-text"):
        await call(plugin, "speech-to-text", audio=RECORDING)
    with pytest.raises(UnsupportedError, match="does not support text-to-speech"):
        await call(plugin, "text-to-speech", text="x")


@pytest.mark.promise("S13")
@pytest.mark.parametrize(
    ("maker", "sent"), [("llama-server", [-1]), ("lmstudio", [-1]), ("vllm", [None]), ("gateway", [])]
)
@pytest.mark.parametrize(("service", "field"), [("generate", "max_tokens"), ("chat", "max_completion_tokens")])
async def test_unlimited_tokens_are_sent_in_each_servers_format(
    serve: Serve, attach: Attach, maker: str, sent: list[int | None], service: str, field: str
) -> None:
    """Without the field, a completion of vLLM has at most 16 tokens."""
    server = await serve(maker)
    request = {"prompt": "a"} if service == "generate" else HELLO
    await call(attach(server), service, **request, **{field: -1})
    (body,) = server.bodies
    assert [value for name, value in body.items() if name.startswith("max_")] == sent


@pytest.mark.promise("S13")
async def test_suffix_that_a_server_ignores_is_rejected(serve: Serve, attach: Attach) -> None:
    plugin = attach(await serve("llama-server"))
    with pytest.raises(InvalidRequestError, match=r"^suffix: llama-server does not support it"):
        await call(plugin, "generate", prompt="a", suffix="b")
    await call(plugin, "generate", prompt="a", suffix="")


@pytest.mark.promise("S13")
async def test_truncated_recording_is_marked(serve: Serve, attach: Attach) -> None:
    """Also if the server gets the original file."""
    plugin = attach(await serve("gateway"))
    whole = wav(spoken(0, 3))
    for sound, truncated in ((whole, None), (whole[:-2000], True), (b"\xff\xfb\x90\x64" + bytes(100), True)):
        answer = await call(plugin, "speech-to-text", audio=base64.b64encode(sound).decode())
        assert answer.get("truncated") is truncated
