"""The conversion of requests for the server, and of its errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine_plugin.engines.openvino.client import ServerClient, complaint_error
from engine_plugin.engines.openvino.requests import completed_event, upstream_body
from engine_plugin.errors import BadGatewayError, InvalidRequestError, UnavailableError
from engine_plugin.transport.answers import Complaint
from engine_plugin.transport.http1 import Http1Client


def body(service: str, request: dict[str, Any], *, stream: bool = False, largest: str = "") -> dict[str, Any]:
    shape: dict[str, Any] = json.loads(upstream_body(service, request, largest, stream=stream))
    return shape


def test_unknown_fields_are_passed_on() -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": "é"}], "our_secret_field": {"a": [1]}}
    assert body("chat", request) == request
    assert body("chat", {**request, "stream": True, "stream_options": {}, "top_p": None}) == request
    assert body("chat", request, stream=True) == {**request, "stream": True}


def test_document_objects_become_texts() -> None:
    request = {"model": "m", "query": "q", "documents": ["a", {"text": "b", "more": 1}], "top_n": 1}
    assert body("rerank", request)["documents"] == ["a", "b"]


@pytest.mark.promise("S13")
@pytest.mark.parametrize("service", ["chat", "generate"])
def test_fields_that_ovms_does_not_support_are_rejected_or_omitted(service: str) -> None:
    asked = {"max_tokens": -1, "max_completion_tokens": -1, "logit_bias": {}, "x": 1}
    body = json.loads(upstream_body(service, asked, stream=True))
    assert body == {"logit_bias": {}, "x": 1, "stream": True}
    with pytest.raises(InvalidRequestError, match=r"^logit_bias: "):
        upstream_body(service, {"logit_bias": {"1": 5}}, stream=True)


def test_request_nested_too_deeply_is_rejected() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        upstream_body("chat", {"a": deep}, stream=False)


@pytest.mark.parametrize("size", ["512x768", "512*768", "512X768"])
def test_size_is_converted(size: str) -> None:
    assert body("text-to-image", {"prompt": "a", "size": size})["size"] == "512x768"


@pytest.mark.parametrize(
    ("size", "complaint"),
    [
        ("512", "must be a width and a height"),
        ("512x", "must be a width and a height"),
        ("0x8", "multiples of 8, as in 8x8"),
        ("513x512", "multiples of 8, as in 512x512, not 513x512"),
        ("72x64", "72x64 is more than 64x64"),
        ("64x72", "64x72 is more than 64x64"),
    ],
)
def test_unsupported_size_is_rejected(size: str, complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^size: .*{complaint}"):
        body("text-to-image", {"prompt": "a", "size": size}, largest="64x64")


def test_seed_is_converted() -> None:
    assert body("text-to-image", {"prompt": "a", "seed": 4}) == {"prompt": "a", "rng_seed": 4}
    assert body("text-to-image", {"prompt": "a", "seed": 4, "rng_seed": 5}) == {"prompt": "a", "rng_seed": 5}


def test_whole_pictures_become_one_event() -> None:
    event, done, rest = completed_event(b'{"created": 5, "data": [{"b64_json": "aaaa"}], "x": 1}').split(b"\n\n")
    assert json.loads(event.removeprefix(b"data: ")) == {
        "type": "image_generation.completed",
        "created": 5,
        "data": [{"b64_json": "aaaa"}],
    }
    assert (done, rest) == (b"data: [DONE]", b"")
    with pytest.raises(BadGatewayError, match="not understood"):
        completed_event(b'{"data": []}')


@pytest.mark.parametrize(
    ("status", "answer", "code", "message"),
    [
        (400, {"error": {"message": "why"}}, 400, "request_data: the engine refuses it: why"),
        (400, {"error": "why"}, 400, "request_data: the engine refuses it: why"),
        (412, {"error": "why"}, 400, "request_data: the engine refuses it: why"),
        (
            400,
            {"error": {"message": "too long", "type": "exceed_context_size_error"}},
            400,
            "request_data: too long. Shorten the request, or take a model with more context",
        ),
        (401, {"error": "why"}, 502, "the engine answered 401: why"),
        (404, {"error": "why"}, 503, "the server does not serve the model now: why. Try again"),
        (500, {"error": {"type": "x"}}, 502, 'the engine answered 500: {"type": "x"}'),
        (501, {"error": "why"}, 501, "the engine does not support this: why"),
        (503, {"error": "why"}, 503, "the engine has no room now: why"),
        (500, ["why"], 502, 'the engine answered 500: ["why"]'),
    ],
)
def test_error_of_the_server_is_mapped(status: int, answer: Any, code: int, message: str) -> None:
    error = complaint_error(Complaint.of_body(status, json.dumps(answer).encode()))
    assert (error.code, error.message) == (code, message)


async def test_closed_client_raises_its_reason() -> None:
    client = ServerClient(Http1Client(("127.0.0.1", 1)), None)
    client.end("the model has left")
    with pytest.raises(UnavailableError, match="the model has left"):
        await client.reload()
    with pytest.raises(UnavailableError, match="the model has left"):
        async with client.post_json("/", b""):
            pass
