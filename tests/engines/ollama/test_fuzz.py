"""Any request in both formats gets an answer, or an error with a field of the request."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import EnginePluginError, InvalidRequestError
from tests.examples import FEW
from tests.patience import LIMIT
from tests.speech.sounds import wav

from .attached.engine import plugin_in
from .hostile import Hostile, whole

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from engine_plugin.plugin import Plugin

FIELD = re.compile(r"[a-z_]+[\w.\[\]]*: ")
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [10**400, -(10**400), 0, -1, 2, 1.0, 1e300, "\ud800", "", "9" * 5000, "-", "data:,", "http://x"]
    )
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=6)
            | st.sampled_from(["type", "function", "name", "arguments", "text", "id", "url", "data"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "input_audio", "x"])},
    optional={"text": JSON, "image_url": JSON | st.fixed_dictionaries({"url": JSON}), "input_audio": JSON},
)
CALLS = st.fixed_dictionaries(
    {"function": JSON | st.fixed_dictionaries({"name": JSON}, optional={"arguments": JSON})}, optional={"id": JSON}
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool", "developer", "x"]) | JSON},
    optional={
        "content": JSON | st.lists(PARTS | JSON, max_size=2),
        "images": JSON,
        "tool_calls": JSON | st.lists(CALLS, max_size=2),
        "tool_call_id": JSON,
        "name": JSON,
        "thinking": JSON,
        "reasoning_content": JSON,
    },
)
OPTIONS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "max_tokens", "max_completion_tokens", "n", "best_of",
    "options", "format", "response_format", "keep_alive", "think", "reasoning_effort", "reasoning", "logprobs",
    "top_logprobs", "tools", "tool_choice", "stream_options", "logit_bias", "echo", "num_ctx", "chat_template_kwargs",
    "images", "suffix", "system", "template", "context", "raw", "dimensions", "encoding_format", "truncate", "stream",
    "language", "task", "timestamp_granularities", "frequency_penalty", "user", "model",
)  # fmt: skip
SETTINGS = st.dictionaries(st.sampled_from(OPTIONS), JSON, max_size=4)
SOUNDS = [base64.b64encode(wav(bytes(320))).decode(), "@@@", "data:;base64,UklGRg=="]
TEXTS = st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=3) | JSON
REQUIRED = {
    "chat": st.fixed_dictionaries({"messages": st.lists(MESSAGES, max_size=3) | JSON}),
    "generate": st.fixed_dictionaries(
        {"prompt": st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=3) | JSON}
    ),
    "embed": st.fixed_dictionaries({"input": TEXTS}),
    "speech-to-text": st.fixed_dictionaries(
        {
            "audio": st.sampled_from([base64.b64encode(wav(bytes(320))).decode(), "@@@", "data:;base64,UklGRg=="])
            | JSON
        }
    ),
}
MADE = {"model", "messages", "prompt", "input", "stream", "options", "format", "think", "images", "logprobs", "tools"}
"""Fields that have another name in Ollama's requests."""


@pytest.fixture
async def hostile() -> AsyncIterator[Hostile]:
    async with Hostile().serving() as server:
        server.answers["/v1/audio/transcriptions"] = whole({"text": "a"})
        yield server


@pytest.fixture(params=[False, True], ids=["openai", "native"])
async def plugin(hostile: Hostile, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Plugin]:
    async with plugin_in(tmp_path, native=request.param, engine_host=hostile.url) as found:
        yield found


@pytest.mark.parametrize("service", list(REQUIRED))
@FEW
@given(data=st.data())
async def test_any_request_is_answered_or_rejected_with_a_field(
    hostile: Hostile, plugin: Plugin, service: str, data: st.DataObject
) -> None:
    request = {"model": "m"} | data.draw(SETTINGS) | data.draw(REQUIRED[service])
    hostile.bodies.clear()
    raw = json.dumps(request).encode()
    await answered(plugin, service, raw)
    if service in ("chat", "generate"):
        await answered(plugin, service, raw, stream=True)
    for path, body in hostile.bodies:
        if path in ("/api/chat", "/api/generate", "/api/embed"):
            sent = json.loads(body.decode("utf-8", "surrogatepass"))
            assert set(sent) <= MADE | set(request)
            assert sent["model"] == "m:latest"
            assert set(sent.get("options", {})) <= allowed_options(request)


def allowed_options(request: dict[str, Any]) -> set[str]:
    given_options = request.get("options")
    named = set(given_options) if isinstance(given_options, dict) else set()
    return {*request, *named, *(("num_predict",) if {"max_tokens", "max_completion_tokens"} & set(request) else ())}


async def answered(plugin: Plugin, service: str, raw: bytes, *, stream: bool = False) -> None:
    """Require an answer, or an error with the name of a field."""
    error = await refusal(plugin, service, raw, stream=stream)
    # 502: the hostile server always sends one embedding.
    if error is not None and "embeddings for" not in str(error):
        assert 400 <= error.code < 500 or error.code == 501, error
        assert FIELD.match(str(error)), error


async def refusal(plugin: Plugin, service: str, raw: bytes, *, stream: bool) -> EnginePluginError | None:
    try:
        async with asyncio.timeout(LIMIT):
            if stream:
                async with plugin.stream(service, raw) as chunks:
                    assert [chunk async for chunk in chunks]
            else:
                assert await plugin.invoke(service, raw)
    except EnginePluginError as error:
        return error
    return None


@pytest.mark.parametrize("service", list(REQUIRED))
@FEW
@given(raw=st.binary(max_size=30) | JSON.map(lambda shape: json.dumps(shape).encode()))
async def test_any_bytes_are_answered_or_rejected(plugin: Plugin, service: str, raw: bytes) -> None:
    await answered(plugin, service, raw)


@pytest.mark.parametrize("service", list(REQUIRED))
@pytest.mark.parametrize(
    "raw",
    [
        b'{"messages": ' + b"[" * 100_000,
        b'{"input": NaN, "prompt": NaN, "audio": NaN, "messages": NaN}',
        b'{"temperature": 1e999, "input": "a", "prompt": "a", "messages": [{"role": "user"}]}',
        b'{"seed": ' + b"1" * 5000 + b"}",
        b"\xff\xfe{}",
    ],
    ids=["deep", "nan", "inf", "digits", "utf-16"],
)
async def test_bytes_that_are_not_a_request_are_rejected(plugin: Plugin, service: str, raw: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="request_data: "):
        await plugin.invoke(service, raw)


@pytest.mark.parametrize("depth", [100, 400, 800, 900, 950, 980])
async def test_deep_requests_are_answered_or_rejected(hostile: Hostile, plugin: Plugin, depth: int) -> None:
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    message = b'{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": %b}}]}' % deep
    await answered(plugin, "chat", b'{"model": "m", "messages": [%b], "options": {"x": %b}}' % (message, deep))
    await answered(plugin, "chat", b'{"model": "m", "messages": [%b], "format": %b}' % (message, deep))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("", "images"),
        (7, "images"),
        ({}, "images"),
        ("http://example.com/cat.png", "does not fetch"),
        ("file:///etc/passwd", "does not fetch"),
        ("data:image/png,abc", "must be in base64"),
        ("data:image/png;base64,", "images"),
    ],
)
async def test_invalid_images_are_rejected(hostile: Hostile, plugin: Plugin, image: Any, words: str) -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": "a", "images": [image]}]}
    with pytest.raises(InvalidRequestError, match=words):
        await plugin.invoke("chat", json.dumps(request).encode())
    assert not hostile.count("/api/chat")


async def test_large_image_is_sent(hostile: Hostile, plugin: Plugin) -> None:
    image = "A" * (16 << 20)
    request = {"model": "m", "messages": [{"role": "user", "content": "a", "images": [f"data:x;base64,{image}"]}]}
    assert await plugin.invoke("chat", json.dumps(request).encode())
    [body] = [json.loads(body) for path, body in hostile.bodies if path == "/api/chat"]
    assert body["messages"][0]["images"] == [image]


async def test_too_many_prompts_are_rejected(hostile: Hostile, plugin: Plugin) -> None:
    """Each prompt becomes a request, all of which are held in memory."""
    request = b'{"model": "m", "n": 2, "prompt": [' + b'"",' * 200_000 + b'""]}'
    with pytest.raises(InvalidRequestError, match="prompt: "):
        await plugin.invoke("generate", request)
    assert not hostile.count("/api/generate")
