"""Log probabilities of completions, converted from the servers' format to OpenAI's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import BadGatewayError
from engine_plugin.openai_api.assemble import assembled
from engine_plugin.openai_api.completions import CompletionLogprobs, wants_logprobs
from engine_plugin.transport.sse import DONE, event_data, event_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.promise("S13")


def token(text: str, *others: str) -> dict[str, Any]:
    tops = [{"token": top, "logprob": -1.0} for top in (text, *others)]
    return {"token": text, "logprob": -1.0, "bytes": None, "top_logprobs": tops}


def event(index: int, text: str, *entries: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": text, "logprobs": {"content": list(entries)}}]}


EVENTS = [event(0, "ab", token("a", "x"), token("b")), event(1, "q", token("q")), event(0, "c", token("c", "y"))]
SHAPE = {
    "tokens": ["a", "b", "c"],
    "token_logprobs": [-1.0, -1.0, -1.0],
    "top_logprobs": [{"a": -1.0, "x": -1.0}, {"b": -1.0}, {"c": -1.0, "y": -1.0}],
    "text_offset": [0, 1, 2],
}


def test_whole_answer_is_converted_to_the_completions_format() -> None:
    blocks = [b"".join(map(event_of, EVENTS)) + DONE]
    answer = json.loads(assembled("generate", blocks, {"logprobs": 2}))
    assert [choice["logprobs"] for choice in answer["choices"]] == [
        SHAPE,
        {"tokens": ["q"], "token_logprobs": [-1.0], "top_logprobs": [{"q": -1.0}], "text_offset": [0]},
    ]
    none = json.loads(assembled("generate", blocks, {"logprobs": 0}))
    assert none["choices"][0]["logprobs"]["top_logprobs"] == [{}, {}, {}]


async def test_each_event_is_converted_to_the_completions_format() -> None:
    async def blocks() -> AsyncIterator[bytes]:
        yield event_of(EVENTS[0]) + event_of(EVENTS[1])
        yield event_of(EVENTS[2]) + event_of({"choices": [], "usage": {}}) + DONE

    heard = [block async for block in CompletionLogprobs(2).stream(blocks())]
    assert heard[-1].endswith(DONE)
    first, _, third, usage = event_data(b"".join(heard))
    assert first["choices"][0]["logprobs"]["text_offset"] == [0, 1]
    assert third["choices"][0]["logprobs"] == {
        "tokens": ["c"], "token_logprobs": [-1.0], "top_logprobs": [{"c": -1.0, "y": -1.0}], "text_offset": [2]
    }  # fmt: skip
    assert usage == {"choices": [], "usage": {}}


def test_answer_in_the_completions_format_is_unchanged() -> None:
    answer = {"choices": [{"index": 0, "text": "abc", "logprobs": SHAPE}, {"index": 1, "logprobs": None}]}
    assert CompletionLogprobs(2).reshape(answer) == answer


@pytest.mark.parametrize("wrong", [[1], {"a": 1}, [{"index": 0, "logprobs": {"content": [1]}}]])
def test_malformed_log_probabilities_are_a_bad_gateway_error(wrong: Any) -> None:
    with pytest.raises(BadGatewayError):
        CompletionLogprobs().reshape({"choices": wrong})


def test_only_requests_with_numeric_logprobs_are_converted() -> None:
    assert wants_logprobs("generate", {"logprobs": 0})
    for service, request in (("chat", {"logprobs": 1}), ("generate", {"logprobs": True}), ("generate", {})):
        assert not wants_logprobs(service, request)
