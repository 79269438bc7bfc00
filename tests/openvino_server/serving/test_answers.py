"""The formats of answers, whole and streamed."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.openvino_server.serving.conftest import parsed
from tests.patience import LIMIT

if TYPE_CHECKING:
    from tests.openvino_server.serving.conftest import Front, Serve

ENTRY = {"token": "é\n", "logprob": -0.5, "bytes": [195, 169, 10], "top_logprobs": [{"token": "e", "logprob": -1.0}]}
TOOL = {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":'}}]}
MORE_TOOL = {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}
TWO = [[0, "a", 1, None, None], [1, "x", 1, None, None], [0, "b", 1, None, "stop"], [1, "y\n", 1, None, "length"]]


@pytest.fixture
async def front(serve: Serve) -> Front:
    return await serve()


async def test_chat_answer_is_a_chat_completion(front: Front) -> None:
    status, answer = await front.chat(script={"parts": TWO})
    assert status == 200
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ab"},
                "logprobs": None,
                "finish_reason": "stop",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "xy\n"},
                "logprobs": None,
                "finish_reason": "length",
            },
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


async def test_streamed_chat_is_chunks_of_one_completion(front: Front) -> None:
    *chunks, end = await front.events(script={"parts": TWO})
    assert end == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [(choice["index"], choice["delta"], choice["finish_reason"]) for choice in choices] == [
        (0, {"role": "assistant", "content": ""}, None),
        (0, {"content": "a"}, None),
        (1, {"role": "assistant", "content": ""}, None),
        (1, {"content": "x"}, None),
        (0, {"content": "b"}, None),
        (0, {}, "stop"),
        (1, {"content": "y\n"}, None),
        (1, {}, "length"),
    ]
    assert all("usage" not in chunk for chunk in chunks)


async def test_requested_usage_is_the_last_event(front: Front) -> None:
    *chunks, last, end = await front.events(stream_options={"include_usage": True})
    assert end == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert chunks
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_tool_calls_and_reasoning_are_streamed_and_assembled(front: Front) -> None:
    parts = [
        [0, {"reasoning_content": "hm"}, 1, None, None],
        [0, TOOL, 1, None, None],
        [0, MORE_TOOL, 1, None, "tool_calls"],
    ]
    *chunks, _ = await front.events(script={"parts": parts})
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:]] == [
        {"reasoning_content": "hm"},
        TOOL,
        MORE_TOOL,
        {},
    ]
    _, answer = await front.chat(script={"parts": parts})
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    message = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]}
    assert answer["choices"][0]["message"] == message
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


async def test_log_probabilities_have_the_format_of_each_route(front: Front) -> None:
    script = {"parts": [[0, "é\n", 1, [ENTRY], None], [0, "é\n", 1, [ENTRY], "stop"]]}
    _, answer = await front.chat(script=script)
    assert answer["choices"][0]["logprobs"] == {"content": [ENTRY, ENTRY]}
    chunks = await front.events(script=script)
    assert [chunk["choices"][0]["logprobs"] for chunk in chunks[1:3]] == [{"content": [ENTRY]}] * 2
    legacy: dict[str, Any] = {"tokens": ["é\n"], "token_logprobs": [-0.5], "top_logprobs": [{"e": -1.0}]}
    *chunks, _ = await front.events("/v3/completions", prompt="p", script=script)
    assert [chunk["choices"][0]["logprobs"] for chunk in chunks] == [
        {**legacy, "text_offset": [0]}, {**legacy, "text_offset": [2]}, None,
    ]  # fmt: skip


async def test_completions_have_text(front: Front) -> None:
    _, answer = await front.post("/v3/completions", {"model": "m", "prompt": ["p"], "script": {"parts": TWO}})
    assert answer["object"] == "text_completion"
    assert [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]] == [
        ("ab", "stop"),
        ("xy\n", "length"),
    ]
    *chunks, end = await front.events("/v3/completions", prompt="p", script={"parts": TWO[:1]})
    assert end == "[DONE]"
    assert chunks[0]["choices"] == [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]


OFFERED = {"type": "function", "function": {"name": "f"}}


async def test_only_parameters_of_generation_reach_the_worker(front: Front) -> None:
    body: dict[str, Any] = {
        "script": {"settings": True},
        "max_completion_tokens": 5,
        "tools": [OFFERED],
        "top_k": 3,
        "seed": None,
    }
    _, answer = await front.chat(**body)
    request = json.loads(answer["choices"][0]["message"]["content"])
    assert request["params"] == {"script": {"settings": True}, "max_tokens": 5, "top_k": 3}
    assert request["tools"] == [OFFERED]
    assert (request["prompt"], request["pictures"]) == ("hello", [])


async def test_error_is_a_status_before_the_first_token_and_an_event_after_it(front: Front) -> None:
    error = {"message": "prompt: too long", "type": "exceed_context_size_error", "code": 400}
    async with front.streaming(script={"parts": [], "then": "error"}) as response:
        assert (response.status, await response.json()) == (400, {"error": error})
    *_, last = await front.events(script={"parts": TWO[:1], "then": "error"})
    assert last == {"error": error}


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/v3/chat/completions", {"model": "m"}, 400, "messages:"),
        ("/v3/chat/completions", {"messages": [{}]}, 400, "model:"),
        ("/v3/chat/completions", {"model": "other/name", "messages": [{}]}, 404, "other/name"),
        ("/v3/chat/completions", {"model": "m", "messages": [{}], "n": 0}, 400, "n:"),
        ("/v3/chat/completions", {"model": "m", "messages": [{}], "stream": "yes"}, 400, "stream:"),
        ("/v3/chat/completions", {"model": "m", "messages": [{}], "stream_options": 1}, 400, "stream_options:"),
        ("/v3/chat/completions", [], 400, "object"),
        ("/v3/completions", {"model": "m"}, 400, "prompt:"),
        ("/v3/embeddings", {"model": "m", "input": "a"}, 400, "for chat, not for embed"),
        ("/v3/embeddings", {"model": "m"}, 400, "input:"),
        ("/v3/embeddings", {"model": "m", "input": 5}, 400, "input:"),
        ("/v3/embeddings", {"model": "m", "input": []}, 400, "input:"),
        ("/v3/embeddings", {"model": "m", "input": [[]]}, 400, "input[0]:"),
        ("/v3/embeddings", {"model": "m", "input": [["a"]]}, 400, "input[0]:"),
        ("/v3/embeddings", {"model": "m", "input": ["a", 1]}, 400, "input[1]:"),
        ("/v3/rerank", {"model": "m", "documents": ["a"]}, 400, "query:"),
        ("/v3/rerank", {"model": "m", "query": "q"}, 400, "documents:"),
        ("/v3/rerank", {"model": "m", "query": "q", "documents": [3]}, 400, "documents[0]:"),
        ("/v3/rerank", {"model": "m", "query": "q", "documents": ["a"], "top_n": 0}, 400, "top_n:"),
        ("/v3/images/generations", {"model": "m"}, 400, "prompt:"),
        ("/v3/images/generations", {"model": "m", "prompt": ""}, 400, "prompt:"),
        ("/v3/images/generations", {"model": "m", "prompt": "p", "size": "big"}, 400, "size:"),
        ("/v3/audio/speech", {"model": "m"}, 400, "input:"),
        ("/v3/audio/speech", {"model": "m", "input": " "}, 400, "input:"),
        ("/v3/audio/transcriptions", {}, 400, "multipart"),
        ("/v3/nothing", {}, 404, "Not Found"),
    ],
)
async def test_error_begins_with_the_invalid_field(
    front: Front, path: str, body: Any, status: int, word: str
) -> None:
    answered, answer = await front.post(path, body)
    assert answered == status
    assert word in answer["error"]["message"]
    assert answer["error"]["code"] == status


async def test_invalid_json_and_a_wrong_key_are_rejected(front: Front) -> None:
    async with front.session.post("/v3/chat/completions", data=b"{") as response:
        assert response.status == 400
    async with front.session.get("/v3/models", headers={"Authorization": "Bearer é"}) as response:
        assert response.status == 401
    async with front.session.get("/v2/health/ready", headers={"Authorization": ""}) as response:
        assert response.status == 200


async def test_models_and_metadata(front: Front) -> None:
    front.config.add("bad", load="fail")
    assert await front.reload() == 500
    _, listed = await front.get("/v3/models")
    [model] = listed["data"]
    assert (model["id"], model["kind"], model["capabilities"]) == ("m", "chat", ["completion"])
    assert model["max_model_len"] == 64
    _, metadata = await front.get("/v2")
    assert metadata["name"]
    assert metadata["version"]


async def test_embeddings_in_both_encodings(serve: Serve) -> None:
    front = await serve(empty=True)
    front.config.add("e", "embed")
    assert await front.reload() == 201
    body = {"model": "e", "input": ["ab", [1, 2, 3]], "dimensions": 3}
    _, answer = await front.post("/v3/embeddings", body)
    assert answer == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [1.0, 0.5, 2.0]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 0.5, 3.0]},
        ],
        "model": "e",
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }
    _, answer = await front.post("/v3/embeddings", {"model": "e", "input": [7, 8], "encoding_format": "base64"})
    assert struct.unpack("<3f", base64.b64decode(answer["data"][0]["embedding"])) == (1, 0.5, 2)
    status, answer = await front.post("/v3/embeddings", {**body, "dimensions": 2})
    assert status == 400
    assert answer["error"]["message"].startswith("dimensions:")


async def test_rerank_sorts_documents_and_limits_them_to_top_n(serve: Serve) -> None:
    front = await serve(empty=True)
    front.config.add("r", "rerank")
    assert await front.reload() == 201
    body: dict[str, Any] = {"model": "r", "query": "q", "documents": ["a", {"text": "aaa"}, "aa", "b"]}
    _, answer = await front.post("/v3/rerank", body)
    assert [hit["index"] for hit in answer["results"]] == [1, 2, 0, 3]
    assert answer["results"][0] == {"index": 1, "relevance_score": 0.3}
    _, answer = await front.post("/v3/rerank", {**body, "top_n": 1, "return_documents": True})
    assert answer["results"] == [{"index": 1, "relevance_score": 0.3, "document": {"text": "aaa"}}]
    _, answer = await front.post("/v3/rerank", {**body, "documents": []})
    assert answer["results"] == []


async def test_images_are_returned_whole_and_with_progress(serve: Serve) -> None:
    front = await serve(empty=True)
    front.config.add("i", "text-to-image")
    assert await front.reload() == 201
    body = {"model": "i", "prompt": "p", "size": "64*32", "num_inference_steps": 2, "seed": 5}
    _, answer = await front.post("/v3/images/generations", body)
    asked = json.loads(base64.b64decode(answer["data"][0]["b64_json"]))
    wanted = {"op": "image", "prompt": "p", "negative_prompt": "", "width": 64, "height": 32, "steps": 2, "seed": 5}
    assert asked == {**wanted, "n": None, "guidance": None, "format": "png"}
    *progress, completed, end = await front.events("/v3/images/generations", **body)
    assert progress == [{"type": "image_generation.progress", "step": step, "total": 2} for step in (1, 2)]
    assert completed["type"] == "image_generation.completed"
    assert completed["data"] == answer["data"]
    assert end == "[DONE]"


def wav_file(samples: bytes, code: int = 1, bits: int = 16, channels: int = 1, rate: int = 16000) -> bytes:
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", code, channels, rate, rate * frame, frame, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"junk" + struct.pack("<I", 3) + b"abc\0"
    return b"RIFF\xff\xff\xff\xff" + body + b"data" + struct.pack("<I", len(samples)) + samples


@pytest.mark.parametrize(
    ("file", "count", "peak"),
    [
        (wav_file(struct.pack("<4h", 0, 16384, -1, 0)), 4, 0.5),
        (wav_file(struct.pack("<4h", 0, 16384, 16384, 16384), channels=2), 2, 0.5),
        (wav_file(b"\x80\xc0\x80\x80", bits=8), 4, 0.5),
        (wav_file(b"\0\0\0\0\0\x40", bits=24), 2, 0.5),
        (wav_file(struct.pack("<2i", 0, 1 << 30), bits=32), 2, 0.5),
        (wav_file(struct.pack("<2f", 0, 0.5), code=3, bits=32), 2, 0.5),
        (wav_file(struct.pack("<2d", 0, 0.5), code=3, bits=64), 2, 0.5),
        (wav_file(b"\0\0" * 8000, rate=8000), 16000, 0.0),
    ],
    ids=["mono", "stereo", "8", "24", "32", "float", "double", "8000 Hz"],
)
async def test_pcm_wav_files_of_any_format_are_read(serve: Serve, file: bytes, count: int, peak: float) -> None:
    front = await serve(empty=True)
    front.config.add("t", "speech-to-text")
    assert await front.reload() == 201
    form = aiohttp.FormData({"model": "t", "language": "en", "timestamp_granularities[]": "word"})
    form.add_field("file", file, filename="a.wav")
    async with front.session.post("/v3/audio/transcriptions", data=form) as response:
        answer = await response.json()
    assert json.loads(answer.pop("text")) == {"count": count, "peak": peak, "task": "transcribe"}
    assert answer == {
        "duration": count / 16000,
        "language": "en",
        "segments": [{"id": 0, "start": 0.0, "end": 0.5, "text": "a b"}],
        "words": [{"word": "a", "start": 0.0, "end": 0.2}, {"word": "b", "start": 0.2, "end": 0.5}],
    }


@pytest.mark.parametrize(
    ("path", "task"), [("transcriptions", "transcribe"), ("translations", "translate")], ids=lambda value: value
)
async def test_audio_is_transcribed_or_translated(serve: Serve, path: str, task: str) -> None:
    front = await serve(empty=True)
    front.config.add("t", "speech-to-text")
    assert await front.reload() == 201
    form = aiohttp.FormData({"model": "t"})
    form.add_field("file", wav_file(b"\0\0" * 400), filename="a.wav")
    async with front.session.post(f"/v3/audio/{path}", data=form) as response:
        assert response.status == 200
        answer = await response.json()
    assert json.loads(answer["text"])["task"] == task


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"ID3",
        wav_file(b""),
        wav_file(b"a"),
        wav_file(b"\0\0", code=7),
        wav_file(b"\0\0", channels=0),
        wav_file(struct.pack("<2f", 0.5, math.nan), code=3, bits=32),
    ],
    ids=["nothing", "MP3", "no sample", "half a sample", "mu-law", "no channel", "not a number"],
)
async def test_invalid_wav_file_is_rejected(serve: Serve, file: bytes) -> None:
    front = await serve(empty=True)
    front.config.add("t", "speech-to-text")
    assert await front.reload() == 201
    form = aiohttp.FormData({"model": "t"})
    form.add_field("file", file, filename="a.wav")
    async with front.session.post("/v3/audio/transcriptions", data=form) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"].startswith("file:")


async def test_speech_is_a_wav_file(serve: Serve) -> None:
    front = await serve(empty=True)
    front.config.add("s", "text-to-speech")
    assert await front.reload() == 201
    async with front.session.post("/v3/audio/speech", json={"model": "s", "input": "hi"}) as response:
        assert response.content_type == "audio/wav"
        data = await response.read()
    assert struct.unpack("<4h", data[44:]) == (0, 16384, -32767, 32767)
    assert struct.unpack_from("<HHI", data, 20) == (1, 1, 16000)


async def test_http_1_0_stream_ends_with_the_connection(front: Front) -> None:
    reader, writer = await asyncio.open_unix_connection(front.address.removeprefix("unix:"))
    try:
        body = json.dumps({"model": "m", "messages": [{"role": "user"}], "stream": True}).encode()
        head = f"POST /v3/chat/completions HTTP/1.0\r\nAuthorization: Bearer a-key\r\nContent-Length: {len(body)}"
        writer.write(f"{head}\r\n\r\n".encode() + body)
        _, _, answer = (await asyncio.wait_for(reader.read(), LIMIT)).partition(b"\r\n\r\n")
    finally:
        writer.close()
    assert parsed(answer)[-1] == "[DONE]"
