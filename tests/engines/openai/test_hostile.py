"""Faulty and malicious servers, byte by byte over real sockets."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.engines.openai import discovery
from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
)
from tests.engines.openai.test_servers import HELLO, call, models, streamed
from tests.patience import LIMIT, within
from tests.speech.sounds import wav

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from engine_plugin.plugin import Plugin
    from tests.engines.openai.conftest import Attach

KEY = "sk-only-for-this-test"
PIECE = b'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}'
DONE = b"data: [DONE]\n\n"
ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b1m\u202e\ud800"


def whole(body: bytes, head: str = "content-type: application/json", status: str = "200 OK") -> bytes:
    """An answer with its length."""
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{head}\r\n\r\n".encode() + body


def listing(*entries: Any) -> bytes:
    """A list of models."""
    return whole(json.dumps({"object": "list", "data": list(entries)}).encode())


def until_end(*pieces: bytes, head: str = "content-type: text/event-stream") -> list[bytes]:
    """An answer that ends with its connection."""
    return [f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode(), *pieces]


class Hostile:
    """Answers GET …/models with `models`, and each POST with the pieces of `answer`, then `endless` repeatedly."""

    def __init__(self) -> None:
        self.models: bytes | list[bytes] = listing({"id": "m"})
        self.answer: bytes | list[bytes] = whole(b"{}")
        self.endless = b""
        self.pause = 0.0
        self.stays = False
        self.heads: list[bytes] = []
        self.sent = 0
        self.url = ""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        finally:
            self._tasks.remove(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            if head.startswith(b"GET") and b"/models " not in head:
                writer.write(whole(b"{}", status="404 Not Found"))
            else:
                await self._answer(self.models if head.startswith(b"GET") else self.answer, writer)

    async def _answer(self, pieces: bytes | list[bytes], writer: asyncio.StreamWriter) -> None:
        for piece in [pieces] if isinstance(pieces, bytes) else pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(self.pause)  # pieces arrive one by one
        while self.endless:
            writer.write(self.endless)
            await writer.drain()
            self.sent += len(self.endless)
        if self.stays:
            await asyncio.get_running_loop().create_future()  # until it is cancelled

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Hostile]:
        listener = await asyncio.start_server(self.serve_one, "127.0.0.1", 0)
        try:
            self.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
            yield self
        finally:
            listener.close()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)


@pytest.fixture
async def hostile(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hostile]:
    monkeypatch.setenv(discovery.PROBE_TIMEOUT, "1")
    async with Hostile().serving() as server:
        yield server


@pytest.fixture
def plugin(hostile: Hostile, attach: Attach) -> Plugin:
    return attach(hostile.url, server="other")


async def raw(plugin: Plugin) -> bytes:
    async with asyncio.timeout(LIMIT), plugin.stream("chat", json.dumps(HELLO).encode()) as chunks:
        return b"".join([chunk async for chunk in chunks])


# Answers


@pytest.mark.parametrize(
    ("begin", "endless", "words"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 1000, "a head of over"),
        (b"HTTP/1.1 200 OK\r\nx: ", b"y" * 8000, "a head of over"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 500, "a head of over|closed the connection"),
        (b"", b"SSH-2.0-OpenSSH_9.6\r\n" * 500, "does not answer in HTTP"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"0" * 5000, "chunked encoding is broken"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n" * 999, "does not end"),
    ],
)
async def test_endless_head_is_rejected(
    hostile: Hostile, plugin: Plugin, begin: bytes, endless: bytes, words: str
) -> None:
    await models(plugin)
    hostile.answer, hostile.endless = begin, endless
    with pytest.raises(BadGatewayError, match=words):
        await call(plugin, "chat", **HELLO)


@pytest.mark.parametrize("begin", [whole(b"")[:-2].replace(b"length: 0", b"length: 1" + b"0" * 12) + b"\r\n", b""])
async def test_endless_body_is_rejected(
    hostile: Hostile, plugin: Plugin, begin: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_plugin.engines.openai.exchange.ANSWER_LIMIT", 1 << 20)
    await models(plugin)
    hostile.answer, hostile.endless = begin or until_end(), b'{"a": ' * 5000
    with pytest.raises(BadGatewayError, match="longer than"):
        await call(plugin, "chat", **HELLO)
    with pytest.raises(BadGatewayError, match=r"longer than|an event of over"):
        await raw(plugin)
    assert hostile.sent < 32 << 20, "the connection is closed"


async def test_endless_model_list_is_rejected(
    hostile: Hostile, plugin: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_plugin.engines.openai.adapters.base.LARGEST_JSON", 1 << 20)
    hostile.models, hostile.endless = until_end(b'{"data": ['), b'{"id": "m"},' * 1000
    with pytest.raises(UnavailableError, match="longer than 1048576 bytes"):
        await models(plugin)


async def test_slow_model_list_times_out(hostile: Hostile, plugin: Plugin) -> None:
    hostile.models, hostile.pause = [bytes([byte]) for byte in listing({"id": "m"})], 0.05
    with pytest.raises(UnavailableError, match="no answer within 1 s"):
        await within(models(plugin))


async def test_unrequested_compression_is_rejected(hostile: Hostile, plugin: Plugin) -> None:
    await models(plugin)
    hostile.answer = whole(gzip.compress(b"{}"), "content-encoding: gzip")
    with pytest.raises(BadGatewayError, match=r"compressed \('gzip'\)"):
        await call(plugin, "chat", **HELLO)
    hostile.models = whole(gzip.compress(b'{"data": []}'), "content-encoding: gzip")
    with pytest.raises(UnavailableError, match="compressed"):
        await models(plugin)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"])
async def test_redirection_is_not_followed(
    hostile: Hostile, attach: Attach, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    async with Hostile().serving() as elsewhere:
        plugin = attach(hostile.url, server="other", send_key="always")
        await models(plugin)
        hostile.answer = whole(b"", f"location: {elsewhere.url}/chat/completions", status)
        with pytest.raises(BadGatewayError, match="redirection, which is not followed") as caught:
            await call(plugin, "chat", **HELLO)
        hostile.models = whole(b"", f"location: {elsewhere.url}/models", status)
        with pytest.raises(UnavailableError, match="redirection"):
            await models(plugin)
        assert KEY.encode() in b"".join(hostile.heads)
        assert elsewhere.heads == []
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("kind", ["text/html", "application/octet-stream; charset=", "", "text/event-stream"])
async def test_wrong_content_type_is_ignored(hostile: Hostile, plugin: Plugin, kind: str) -> None:
    hostile.answer = whole(b'{"object": "chat.completion", "choices": []}', f"content-type: {kind}")
    assert (await call(plugin, "chat", **HELLO))["choices"] == []
    hostile.answer = until_end(PIECE % b"a" + b"\n\n" + DONE, head=f"content-type: {kind}")
    assert len(await streamed(plugin, "chat", **HELLO)) == 1


@pytest.mark.parametrize(
    "body", [b"[]", b"7", b"null", b'"text"', b"", b"<html>oh</html>", b'{"a": 1', b"[" * 100_000, b"\xff\xfe{}"]
)
async def test_answer_that_is_not_an_object_is_rejected(hostile: Hostile, plugin: Plugin, body: bytes) -> None:
    hostile.answer = whole(body)
    for service, request in (
        ("chat", HELLO),
        ("embed", {"input": "a"}),
        ("rerank", {"query": "a", "documents": ["b"]}),
    ):
        with pytest.raises(BadGatewayError, match="not a JSON object"):
            await call(plugin, service, **request)


async def test_large_answer_that_is_not_an_object_is_rejected(hostile: Hostile, plugin: Plugin) -> None:
    hostile.answer = whole(b"[" + b"1," * 200_000 + b"1]")
    with pytest.raises(BadGatewayError, match="not a JSON object"):
        await call(plugin, "embed", input="a")


@pytest.mark.parametrize("body", [{"error": "no"}, {"id": 1, "error": {"message": "no"}}])
async def test_error_with_status_200_is_raised(hostile: Hostile, plugin: Plugin, body: dict[str, Any]) -> None:
    hostile.answer = whole(json.dumps(body).encode())
    with pytest.raises(EnginePluginError, match="no"):
        await call(plugin, "chat", **HELLO)
    hostile.answer = whole(json.dumps({"error": None, "choices": []}).encode())
    assert (await call(plugin, "chat", **HELLO))["choices"] == []


HEARD: list[Any] = [
    [],
    7,
    {},
    {"text": 7},
    {"text": None},
    {"text": "a", "segments": 7},
    {"text": "a", "segments": [7, None]},
    {"text": "a", "segments": [{"start": "x", "end": None, "text": 7}]},
    {"text": "a", "segments": [{"start": float("nan"), "end": -1, "text": "a"}]},
    {"text": "a", "segments": [{"start": 1e400, "end": 1, "text": "a"}]},
    {"text": "a", "duration": "long", "language": 7, "words": 7},
    {"text": "\ud800"},
]


@pytest.mark.parametrize("shape", HEARD, ids=str)
async def test_invalid_transcription_is_rejected(hostile: Hostile, plugin: Plugin, shape: Any) -> None:
    hostile.answer = whole(json.dumps(shape).encode())
    recording = base64.b64encode(wav(bytes(48_000))).decode()
    for more in ({}, {"response_format": "verbose_json"}):
        try:
            answer = await call(plugin, "speech-to-text", audio=recording, model="m", **more)
        except BadGatewayError:
            continue
        assert isinstance(answer["text"], str)
        assert json.dumps(answer, allow_nan=False)
        for segment in answer["segments"]:
            assert 0 <= segment["start"] <= segment["end"]


@pytest.mark.parametrize(
    "body", [b"", b"RIFF", b"{}", wav(bytes(320))[:40], b"RIFF\xff\xff\xff\xffWAVEfmt \xff\xff\xff\xff"]
)
async def test_invalid_speech_is_rejected(hostile: Hostile, plugin: Plugin, body: bytes) -> None:
    hostile.answer = whole(body, "content-type: audio/wav")
    with pytest.raises(BadGatewayError):
        await call(plugin, "text-to-speech", text="a", model="m")


@pytest.mark.parametrize(
    "results", [7, [7], [{}], [{"index": 9, "relevance_score": 1}], [{"index": -1, "relevance_score": 1}]]
)
async def test_invalid_ranking_is_rejected(hostile: Hostile, plugin: Plugin, results: Any) -> None:
    hostile.answer = whole(json.dumps({"results": results}).encode())
    with pytest.raises(BadGatewayError):
        await call(plugin, "rerank", query="a", documents=["b", "c"], model="m")


# Streams


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
async def test_each_line_ending_is_accepted(hostile: Hostile, plugin: Plugin, end: bytes) -> None:
    lines = [b": hello", b"", b"event: message", b"id: 1", PIECE % b"one", b"", b":", b"retry: 9", b""]
    stream = end.join([*lines, PIECE % b"two", b"", b"data: [DONE]", b"", b""])
    hostile.answer = until_end(*[stream[at : at + 7] for at in range(0, len(stream), 7)])
    assert await raw(plugin) == stream
    error = end.join(
        [PIECE % b"one", b"", b'data:{"error": {"message": "it broke"}}', b"", b"data: [DONE]", b"", b""]
    )
    hostile.answer = until_end(error)
    with pytest.raises(BadGatewayError, match="it broke"):
        await raw(plugin)


async def test_characters_split_between_chunks_are_joined(hostile: Hostile, plugin: Plugin) -> None:
    stream = PIECE % "é🎉".encode() + b"\n\n" + DONE
    hostile.answer, hostile.pause = until_end(*[stream[at : at + 1] for at in range(len(stream))]), 0.0005
    chunks = []
    async with asyncio.timeout(LIMIT), plugin.stream("chat", json.dumps(HELLO).encode()) as told:
        chunks = [chunk async for chunk in told]
    assert b"".join(chunks) == stream
    assert "é🎉" in b"".join(chunks).decode()
    assert all(chunk.decode() for chunk in chunks), "each chunk by itself is UTF-8"


@pytest.mark.parametrize(
    "error",
    [
        b'data: {"error":{"message":"it broke","code":500}}',
        b'data: {"id":"x","choices":[],"error":{"message":"it broke","code":"server_error"}}',
        b'data: {"error":"it broke"}',
        b'event: error\ndata: {"error": {"message": "it broke"}}',
    ],
)
async def test_error_in_a_stream_is_raised(hostile: Hostile, plugin: Plugin, error: bytes) -> None:
    first = PIECE % b"one" + b"\n\n"
    hostile.answer = until_end(first + error + b"\n\n" + PIECE % b"two" + b"\n\n" + DONE)
    heard = b""
    with pytest.raises(BadGatewayError, match="it broke"):  # noqa: PT012  # what came before counts
        async with plugin.stream("chat", json.dumps(HELLO).encode()) as told:
            async for chunk in told:
                heard += chunk
    assert heard == first


async def test_text_that_looks_like_an_error_or_end_is_content(hostile: Hostile, plugin: Plugin) -> None:
    words = rb"\n\ndata: {\"error\": {}}\n\ndata: [DONE]\n\n"
    stream = PIECE % words + b'\n\ndata: {"error": null, "choices": []}\n\n'
    hostile.answer = until_end(stream + DONE)
    assert await raw(plugin) == stream + DONE
    hostile.answer = until_end(stream)
    with pytest.raises(BadGatewayError, match="before it was done"):
        await raw(plugin)


async def test_second_end_marker_is_ignored(hostile: Hostile, plugin: Plugin) -> None:
    first = PIECE % b"one" + b"\n\n"
    hostile.answer = until_end(first + DONE + DONE + first)
    assert await raw(plugin) == first + DONE
    hostile.answer = until_end(first + DONE, DONE + first)
    assert await raw(plugin) == first + DONE


async def test_stream_ends_at_its_marker_although_the_server_stays(hostile: Hostile, plugin: Plugin) -> None:
    hostile.answer, hostile.stays = until_end(PIECE % b"one" + b"\n\n" + DONE), True
    hostile.models = listing({"id": "m"})
    async with asyncio.timeout(LIMIT):
        assert (await raw(plugin)).endswith(DONE)


@pytest.mark.parametrize("end", [b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\r\n"])
async def test_end_marker_without_an_empty_line_is_accepted(hostile: Hostile, plugin: Plugin, end: bytes) -> None:
    first = PIECE % b"one" + b"\n\n"
    hostile.answer = until_end(first, end)
    assert await raw(plugin) == first + end.strip() + b"\n\n"


async def test_stream_without_end_marker_fails(hostile: Hostile, plugin: Plugin) -> None:
    hostile.answer = until_end(PIECE % b"one" + b"\n\n")
    with pytest.raises(BadGatewayError, match="before it was done"):
        await raw(plugin)
    hostile.answer = until_end()
    with pytest.raises(BadGatewayError, match="before it was done"):
        await raw(plugin)


@pytest.mark.parametrize(
    "event",
    [
        b"data: 7",
        b"data: [1]",
        b'data: {"choices": 7}',
        b'data: {"choices": [7]}',
        b'data: {"choices": [{"index": {}, "delta": {}}]}',
        b'data: {"choices": [{"index": 0, "delta": {"content": 7}}]}',
        b'data: {"choices": [{"index": 0, "delta": {}}, {"index": "1", "delta": {}}]}',
        b'data: {"choices": [{"delta": {"tool_calls": [{"index": 1000000000}]}}]}',
        b'data: {"choices": [{"delta": {"tool_calls": [{"index": -1}]}}]}',
        b'data: {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": 7}]}}]}',
        b'data: {"choices": [{"delta": {}, "logprobs": 7}]}',
        b'data: {"choices": [], "usage": {}}',
        b'data: {"choices": ' + b"[" * 5000,
    ],
)
async def test_events_that_cannot_be_assembled_are_rejected(hostile: Hostile, attach: Attach, event: bytes) -> None:
    hostile.answer = until_end(event + b"\n\n" + DONE)
    with pytest.raises(BadGatewayError):
        await call(attach(hostile.url, server="other", assemble="always"), "chat", **HELLO)


# Models


@pytest.mark.parametrize(
    "name", ["a\x00b", "a\nb", f"a{ESCAPES}", "x" * 1_000_000, "", "\ud800", "\u202egnp.exe", "a\x9bm"]
)
async def test_unprintable_model_name_is_ignored(hostile: Hostile, plugin: Plugin, name: str) -> None:
    hostile.models = listing({"id": name}, {"id": "m"})
    assert list(await models(plugin)) == ["m"]


async def test_model_name_like_a_path_is_accepted(hostile: Hostile, plugin: Plugin) -> None:
    name = "../../../etc/passwd"
    hostile.models = listing({"id": name}, {"id": "mlx/a b%2f?x#y"})
    assert set(await models(plugin)) == {name, "mlx/a b%2f?x#y"}
    hostile.answer = whole(b'{"object": "chat.completion", "choices": []}')
    await call(plugin, "chat", **HELLO, model=name)
    assert hostile.heads[-1].startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")


async def test_model_list_is_limited(hostile: Hostile, plugin: Plugin) -> None:
    hostile.models = listing(*({"id": f"model-{number}"} for number in range(100_000)))
    async with asyncio.timeout(LIMIT):
        assert 0 < len(await models(plugin)) <= 5000
        hostile.answer = whole(json.dumps({"error": {"message": "model not found"}}).encode(), status="404 Not Found")
        with pytest.raises(ModelNotFoundError, match="Did you mean"):
            await call(plugin, "chat", **HELLO, model="model-1x")


WRONG: list[Any] = [None, True, -1, 1e300, "x" * 100_000, ESCAPES, [], [7], {}, {"a": {}}]


@pytest.mark.parametrize("kind", ["vllm", "llama-server", "lmstudio", "ovms", "other"])
async def test_wrong_types_in_reports_are_ignored(hostile: Hostile, attach: Attach, kind: str) -> None:
    keys = (
        "object",
        "created",
        "owned_by",
        "max_model_len",
        "meta",
        "kind",
        "capabilities",
        "context_window",
        "root",
    )
    entries = [{"id": f"m{place}", **dict.fromkeys(keys, wrong)} for place, wrong in enumerate(WRONG)]
    hostile.models = listing(*WRONG, *({"id": wrong} for wrong in WRONG), *entries)
    plugin = attach(hostile.url, server=kind) if kind != "lmstudio" else attach(hostile.url)
    found = await models(plugin)
    assert {f"m{place}" for place in range(len(WRONG))} == set(found)
    for model in found.values():
        wire = json.dumps(model.to_wire(), ensure_ascii=False)
        assert wire.encode()
        assert wire.isprintable()
        assert len(wire) < 5000
    assert await plugin.running_models() is not None


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"data": 7}', b'{"data": {"id": "m"}}', b"7", b"\xff", b"{}"])
async def test_invalid_model_list_is_rejected(hostile: Hostile, plugin: Plugin, body: bytes) -> None:
    hostile.models = whole(body)
    assert await models(plugin) == {}


@pytest.mark.parametrize("status", ["400 Bad", "404 Not Found", "422 X", "429 Y", "500 Z", "503 W", "999 V"])
@pytest.mark.parametrize(
    "shape",
    [
        lambda words: {"error": {"message": words, "code": [], "type": {}}},
        lambda words: {"error": words},
        lambda words: {"detail": [{"loc": [words, 7], "msg": words}, 7, None]},
        lambda words: [words],
        lambda words: words,
    ],
)
async def test_control_characters_in_an_error_are_escaped(
    hostile: Hostile, plugin: Plugin, status: str, shape: Callable[[str], Any]
) -> None:
    await models(plugin)
    hostile.answer = whole(json.dumps(shape(ESCAPES + "x" * 10_000)).encode(), status=status)
    with pytest.raises(EnginePluginError) as caught:
        await call(plugin, "chat", **HELLO)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000


async def test_control_characters_in_a_stream_error_are_escaped(hostile: Hostile, plugin: Plugin) -> None:
    error = {"error": {"message": ESCAPES + "it broke", "code": 400}}
    hostile.answer = until_end(b"data: " + json.dumps(error).encode() + b"\n\n")
    with pytest.raises(InvalidRequestError, match="it broke") as caught:
        await raw(plugin)
    assert str(caught.value).isprintable()


async def test_disconnect_at_any_byte_is_reported(hostile: Hostile, plugin: Plugin) -> None:
    await models(plugin)
    answer = whole(b'{"object": "chat.completion", "choices": []}')
    for end in range(0, len(answer), 5):
        hostile.answer = answer[:end]
        with pytest.raises(BadGatewayError):
            await call(plugin, "chat", **HELLO)
