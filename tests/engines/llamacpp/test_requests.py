"""The conversion of requests for llama.cpp, and of its answers."""

from __future__ import annotations

import base64
import json
import re
import struct
from typing import Any

import pytest

from engine_plugin.engines.llamacpp import requests
from engine_plugin.engines.llamacpp.requests import upstream_request
from engine_plugin.engines.llamacpp.server import complaint_error
from engine_plugin.errors import BadGatewayError, EnginePluginError, InvalidRequestError
from engine_plugin.jsontext import write_request
from engine_plugin.transport.answers import Complaint


def body(service: str, request: dict[str, Any], *, stream: bool = False) -> dict[str, Any]:
    shape: dict[str, Any] = json.loads(sent(service, request, stream=stream))
    return shape


def sent(service: str, request: dict[str, Any], *, stream: bool = False) -> bytes:
    return write_request(upstream_request(service, request, stream=stream))


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("service", ["chat", "generate"])
def test_texts_are_always_streamed(service: str) -> None:
    """llama.cpp detects a disconnected client only while it writes a stream."""
    unary = body(service, {"stream": False, "stream_options": {"include_usage": False}, "x": [1]})
    assert unary == {"stream": True, "stream_options": {"include_usage": True}, "x": [1]}
    assert body(service, {"x": 1}, stream=True) == {"stream": True, "x": 1}
    wanted = {"stream_options": {"include_usage": True}}
    assert body(service, wanted, stream=True) == {"stream": True, **wanted}


@pytest.mark.promise("S13")
@pytest.mark.parametrize(
    ("service", "request_", "begin"),
    [
        ("chat", {"suffix": "x"}, "suffix: llama.cpp does not support it"),
        ("chat", {"max_tokens": 0}, "max_tokens: must be at least 1, or -1 for no limit"),
        ("generate", {"max_tokens": 0}, "max_tokens: must be at least 1"),
        ("chat", {"logprobs": True, "top_logprobs": -1}, "top_logprobs: must be from 0 to 20, not -1"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs: must be from 0 to 20, not 21"),
        ("chat", {"tool_choice": "required"}, "tool_choice: is required, but there are no tools"),
        ("chat", {"tool_choice": "required", "tools": []}, "tool_choice: is required, but there are no tools"),
    ],
)
def test_fields_that_llama_cpp_ignores_are_rejected(service: str, request_: dict[str, Any], begin: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{begin}"):
        sent(service, request_)


@pytest.mark.promise("S2")
@pytest.mark.parametrize(("service", "field"), [("embed", "input"), ("generate", "prompt")])
@pytest.mark.parametrize("token", [-1, 2**31, 2**32 + 1, 2**63, -(2**63), 2**64 + 1])
def test_invalid_token_id_is_rejected_with_its_place(service: str, field: str, token: int) -> None:
    for items, place in (([7, token], "[1]"), (["a", [7, 8, token]], "[1][2]")):
        with pytest.raises(InvalidRequestError, match=rf"^{field}{re.escape(place)}: {token} is not a token"):
            sent(service, {field: items})
    assert body(service, {field: [[0, 2**31 - 1]]})[field] == [[0, 2**31 - 1]]


def test_empty_stop_string_is_removed() -> None:
    for stop, sent in (("", None), ([""], None), (["", "a"], ["a"]), ("a", ["a"]), ([], None), (None, None)):
        assert body("chat", {"stop": stop}).get("stop") == sent


def test_logprob_of_the_chosen_token_is_requested() -> None:
    assert body("chat", {"logprobs": True, "top_logprobs": 0})["top_logprobs"] == 1
    assert body("chat", {"logprobs": False, "top_logprobs": 0})["top_logprobs"] == 0


def test_tool_without_a_type_is_a_function() -> None:
    assert body("chat", {"tools": [{"function": {"name": "a"}}]})["tools"] == [tool("a")]


def test_embed_and_rerank_requests_have_no_stream_field() -> None:
    assert body("embed", {"input": "a", "dimensions": 3}) == {"input": "a", "dimensions": 3}
    asked = {"query": "a", "documents": ["b", {"text": "c", "id": 1}], "top_n": 1}
    assert body("rerank", asked) == {"query": "a", "documents": ["b", "c"]}


@pytest.mark.parametrize(
    ("request_", "tools", "choice"),
    [
        ({"tools": [tool("a")], "tool_choice": "none"}, None, None),
        ({"tool_choice": "none"}, None, None),
        ({"tools": [tool("a")], "tool_choice": "auto"}, ["a"], "auto"),
        ({"tools": [tool("a")]}, ["a"], None),
        ({"tools": [tool("a"), tool("b")], "tool_choice": tool("b")}, ["b"], "required"),
    ],
)
def test_tool_choice_is_converted(request_: dict[str, Any], tools: list[str] | None, choice: str | None) -> None:
    before = json.dumps(request_)
    asked = body("chat", request_)
    assert asked.get("tool_choice") == choice
    given_tools = asked.get("tools")
    assert (given_tools and [one["function"]["name"] for one in given_tools]) == tools
    assert json.dumps(request_) == before


@pytest.mark.parametrize("choice", [tool("b"), {}, {"function": "a"}, {"function": {}}, {"type": "allowed_tools"}])
def test_tool_choice_of_an_unknown_tool_is_rejected(choice: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"^tool_choice: names the function .* not among tools$"):
        body("chat", {"tools": [tool("a"), {"type": "custom"}], "tool_choice": choice})


def test_request_nested_too_deeply_is_rejected() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match=r"^request_data: is nested too deeply$"):
        sent("chat", {"x": deep})
    while deep:  # unnested step by step, because the interpreter would recurse
        deep = deep.pop()


def test_other_dimensions_are_rejected() -> None:
    plain = json.dumps({"data": [{"embedding": [0.1, 0.2]}]}).encode()
    packed = json.dumps({"data": [{"embedding": base64.b64encode(struct.pack("<2f", 1, 2)).decode()}]}).encode()
    for answer in (plain, packed):
        assert requests.embeddings_answer(answer, {"dimensions": 2}) == answer
        with pytest.raises(InvalidRequestError, match=r"^dimensions: this model has 2, .* to 3$"):
            requests.embeddings_answer(answer, {"dimensions": 3})
    assert requests.embeddings_answer(b"anything", {}) == b"anything"
    for wrong in (
        b"",
        b"[]",
        b"{}",
        b'{"data":[]}',
        b'{"data":[{"embedding":1}]}',
        b'{"data":[{"embedding":"\\u00e4"}]}',
    ):
        with pytest.raises(BadGatewayError, match="embeddings are invalid"):
            requests.embeddings_answer(wrong, {"dimensions": 2})


@pytest.mark.parametrize(
    ("status", "shape", "code", "message"),
    [
        (400, {}, 400, "request_data: the engine refuses it: why"),
        (400, {"type": "exceed_context_size_error"}, 400, "engine.context_length in plugin.yaml"),
        (401, {}, 502, "the engine answered 401: why"),
        (404, {}, 502, "the engine answered 404: why"),
        (422, {}, 400, "request_data: "),
        (500, {"type": "server_error"}, 502, "the engine answered 500: why"),
        (501, {}, 501, "the engine does not support this: why"),
        (503, {}, 503, "the engine has no room now: why"),
    ],
)
def test_error_of_llama_cpp_is_mapped(status: int, shape: dict[str, Any], code: int, message: str) -> None:
    error: EnginePluginError = complaint_error(Complaint(status, "why", shape))
    assert error.code == code
    assert message in error.message


def test_too_large_input_is_an_error_of_the_caller() -> None:
    """llama.cpp answers 500 and recommends a setting that this engine does not have."""
    told = "input (3002 tokens) is too large to process. increase the physical batch size (current batch size: 512)"
    error = complaint_error(Complaint(500, told, {"type": "server_error"}))
    assert error.code == 400
    assert error.message.startswith(
        "request_data: input (3002 tokens) is too large to process (engine.context_length"
    )
    assert "batch" not in error.message
