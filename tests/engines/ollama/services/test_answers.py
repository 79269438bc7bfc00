"""Unary answers: chat completions, completions, embeddings, metrics."""

from __future__ import annotations

import base64
import json
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.engines.ollama.answers import (
    Delta,
    collect,
    openai_answer,
    openai_embeddings,
    timings,
    usage,
    whole_answer,
)
from engine_plugin.errors import BadGatewayError, InvalidRequestError
from tests.transport.test_ndjson import Body

FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)


def completion(service: str, *wholes: dict[str, Any], **request: Any) -> dict[str, Any]:
    shape: dict[str, Any] = json.loads(openai_answer(service, wholes, {"model": "m"} | request))
    return shape


def collected(service: str, last: dict[str, Any], *texts: str) -> dict[str, Any]:
    """The whole answer of lines with these texts."""
    return whole_answer(service, last, [Delta(text, "") for text in texts])


def test_chat_answer_has_all_openai_fields() -> None:
    call = {"function": {"name": "look", "arguments": {"a": 1}}}
    logprob = {"token": "a", "logprob": -1.5, "bytes": [97]}
    last = {"done_reason": "stop", "prompt_eval_count": 2, "eval_count": 3}
    deltas = [Delta("a", "c", [call]), Delta("b", "d", logprobs=[logprob])]
    answer = completion("chat", whole_answer("chat", last, deltas))
    [choice] = answer["choices"]
    [converted] = choice["message"].pop("tool_calls")
    assert converted.pop("id").startswith("call_")
    assert converted == {"type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "ab", "reasoning_content": "cd"},
        "logprobs": {"content": [{"bytes": [97], "top_logprobs": [], "token": "a", "logprob": -1.5}]},
        "finish_reason": "tool_calls",
    }
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "m"
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


async def test_lines_that_add_nothing_are_not_kept() -> None:
    lines = [b"{}\n" * 1000] * 20
    body = Body(*lines, b'{"response": "a"}\n{"response": "b", "done": true}\n')
    tracemalloc.start()
    try:
        answer = await collect("generate", body, "m")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer == {"response": "ab", "done": True}
    assert peak < 1 << 20


def test_completion_of_several_prompts_counts_each_prompt_once() -> None:
    first, second = (collected("generate", {"prompt_eval_count": 2, "eval_count": 1}, text) for text in "ab")
    answer = completion("generate", first, first, second, second, n=2)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "a"), (1, "a"), (2, "b"), (3, "b")
    ]  # fmt: skip
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
    assert answer["object"] == "text_completion"


@pytest.mark.parametrize(
    ("request_has", "thinking", "content"),
    [
        ({}, "hm", "yes"),
        ({"raw": True}, None, "hm</think>yes"),
        ({"format": "json"}, None, "hm</think>yes"),
        ({"response_format": {"type": "json_object"}}, None, "hm</think>yes"),
    ],
)
def test_think_tags_are_split_unless_raw_or_json(
    request_has: dict[str, Any], thinking: str | None, content: str
) -> None:
    [choice] = completion("generate", collected("generate", {}, "hm</th", "ink>yes"), **request_has)["choices"]
    assert (choice.get("reasoning_content"), choice["text"]) == (thinking, content)


@pytest.mark.parametrize(
    ("reason", "wanted"), [("stop", "stop"), ("length", "length"), ("load", "stop"), (None, "stop")]
)
def test_finish_reason(reason: str | None, wanted: str) -> None:
    [choice] = completion("chat", collected("chat", {"done_reason": reason}))["choices"]
    assert choice["finish_reason"] == wanted
    assert choice["message"] == {"role": "assistant", "content": ""}


def test_native_answer_is_last_line_with_all_texts() -> None:
    call = {"function": {"name": "look", "arguments": {}}}
    last = {"model": "m", "message": {"role": "assistant", "content": "b", "new": 1}, "done": True, "eval_count": 3}
    deltas = [Delta("a", "c", [call]), Delta("b", "", logprobs=[{"token": "a"}])]
    assert whole_answer("chat", last, deltas) == {
        "model": "m",
        "message": {"role": "assistant", "content": "ab", "new": 1, "thinking": "c", "tool_calls": [call]},
        "done": True,
        "eval_count": 3,
        "logprobs": [{"token": "a"}],
    }
    last = {"model": "m", "response": "", "done": True, "context": [1]}
    assert collected("generate", last, "a", "b") == last | {"response": "ab"}


def test_count_without_duration_has_speed_zero() -> None:
    assert timings({}) == {}
    assert timings({"eval_count": 0, "eval_duration": 0}) == {}
    assert timings({"eval_count": 5})["predicted_per_second"] == 0
    converted = timings(
        {"eval_count": 5, "eval_duration": 500_000_000, "load_duration": 1_500_000, "total_duration": 9}
    )
    assert converted["predicted_per_second"] == 10
    assert converted["predicted_ms"] == 500
    assert converted["load_ms"] == 1.5
    assert converted["prompt_per_second"] == 0


@pytest.mark.parametrize("value", ["5", True, [1]])
def test_invalid_counts_are_rejected(value: Any) -> None:
    with pytest.raises(BadGatewayError, match="the engine's eval_count"):
        usage([{"eval_count": value}])


# Embeddings


def embedded(vectors: list[list[float]], separators: tuple[str, str] = (",", ":"), **more: Any) -> bytes:
    return json.dumps({"model": "x", "embeddings": vectors, **more}, separators=separators).encode()


@given(
    st.lists(st.lists(FLOATS, min_size=1, max_size=4), min_size=1, max_size=4),
    st.sampled_from(((",", ":"), (", ", ": "))),
)
def test_vectors_keep_their_text(vectors: list[list[float]], separators: tuple[str, str]) -> None:
    request: dict[str, Any] = {"model": "m", "input": ["a"] * len(vectors)}
    data = embedded(vectors, separators, prompt_eval_count=7, note="]]")
    answer = json.loads(openai_embeddings(data, request))
    assert answer == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)
        ],
        "model": "m",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }
    packed = json.loads(openai_embeddings(data, request | {"encoding_format": "base64"}))
    for entry, vector in zip(packed["data"], vectors, strict=True):
        assert list(struct.unpack(f"<{len(vector)}f", base64.b64decode(entry["embedding"]))) == vector


def test_dimensions_the_server_ignores_are_rejected() -> None:
    request = {"model": "m", "input": "a", "dimensions": 3}
    assert openai_embeddings(embedded([[1, 2, 3]]), request)
    with pytest.raises(InvalidRequestError, match=r"dimensions: expected 3, but this model gives 2"):
        openai_embeddings(embedded([[1, 2]]), request)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'{"embeddings":5}',
        b'{"embeddings":[[1,2]',
        b'{"embeddings":[[1,2],[3',
        b'{"embeddings":[[1,2],5]}',
        b'{"embeddings":[[1,[2]]]}',
        embedded([]),
        embedded([[1.0], [2.0]]),
    ],
)
def test_malformed_embeddings_are_rejected(data: bytes) -> None:
    with pytest.raises(BadGatewayError, match="the engine"):
        openai_embeddings(data, {"model": "m", "input": ["a"]})


@pytest.mark.parametrize("data", [b'{"embeddings":[[1e300]]}', b'{"embeddings":[[1,"a"]]}', b'{"embeddings":[[x]]}'])
def test_invalid_numbers_in_embeddings_are_rejected(data: bytes) -> None:
    with pytest.raises(BadGatewayError, match="the engine's embeddings are not understood"):
        openai_embeddings(data, {"model": "m", "input": "a", "encoding_format": "base64"})
