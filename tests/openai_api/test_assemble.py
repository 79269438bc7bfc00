"""Events joined to one answer; tests/engines/llamacpp/test_answers.py compares those of a real engine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import BadGatewayError
from engine_plugin.openai_api.assemble import chat_completion, text_completion

PIECES = st.lists(st.text(max_size=5), max_size=8)


def chunk(index: int, delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "finish_reason": finish, **more}
    return {"object": "chat.completion.chunk", "id": "x", "created": 1, "model": "m", "choices": [choice]}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"choices": [], "usage": counts}


def chat(*events: dict[str, Any], each: int = 1) -> dict[str, Any]:
    return chat_completion(events, each)


@given(st.lists(PIECES, min_size=1, max_size=3), st.randoms())
def test_texts_are_joined_in_any_order_of_choices(choices: list[list[str]], random: Any) -> None:
    turns = [index for index, pieces in enumerate(choices) for _ in range(len(pieces) + 1)]
    random.shuffle(turns)
    left = [iter([*pieces, None]) for pieces in choices]
    events = []
    for index in turns:
        piece = next(left[index])
        events.append(chunk(index, {}, "stop") if piece is None else chunk(index, {"content": piece}))
    answer = chat(*events, usage(3, 4))
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(choices)))
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["".join(part) for part in choices]
    assert all(choice["finish_reason"] == "stop" for choice in answer["choices"])
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["total_tokens"] == 7


@given(st.lists(st.tuples(st.sampled_from(("a", "b")), st.lists(st.text(max_size=4), max_size=4)), max_size=4))
def test_tool_calls_are_joined(calls: list[tuple[str, list[str]]]) -> None:
    events = [chunk(0, {"role": "assistant", "content": None})]
    for number, (name, pieces) in enumerate(calls):
        start = {
            "index": number,
            "id": f"id{number}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        events.append(chunk(0, {"tool_calls": [start]}))
        events += [
            chunk(0, {"tool_calls": [{"index": number, "function": {"arguments": piece}}]}) for piece in pieces
        ]
    events.append(chunk(0, {}, "tool_calls"))
    [choice] = chat(*events)["choices"]
    got = [
        (call["id"], call["type"], call["function"]["name"], call["function"]["arguments"])
        for call in choice["message"].get("tool_calls", [])
    ]
    wanted = [(f"id{n}", "function", name, "".join(pieces)) for n, (name, pieces) in enumerate(calls)]
    assert got == wanted
    assert choice["finish_reason"] == "tool_calls"


def test_reasoning_logprobs_and_timings_are_kept() -> None:
    answer = chat(
        chunk(0, {"role": "assistant", "content": None}),
        chunk(0, {"reasoning_content": "so "}),
        chunk(0, {"reasoning_content": "then"}, logprobs={"content": [{"token": "a"}]}),
        chunk(0, {"content": "b"}, logprobs={"content": [{"token": "b"}]}),
        chunk(0, {}, "length") | {"timings": {"predicted_n": 2}},
    )
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "b", "reasoning_content": "so then"}
    assert choice["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}]}
    assert answer["timings"] == {"predicted_n": 2}
    assert "usage" not in answer


@pytest.mark.parametrize(
    ("usages", "each", "wanted"),
    [
        ([usage(3, 4)], 1, (3, 4, 7)),
        ([usage(3, 4), usage(3, 6)], 2, (3, 10, 13)),
        ([usage(3, 4), usage(5, 6)], 1, (8, 10, 18)),
        ([usage(3, 1), usage(3, 1), usage(5, 1), usage(5, 1)], 2, (8, 4, 12)),
    ],
)
def test_usage_is_taken_from_the_events(
    usages: list[dict[str, Any]], each: int, wanted: tuple[int, int, int]
) -> None:
    counts = chat(chunk(0, {"content": "a"}), *usages, each=each)["usage"]
    assert (counts["prompt_tokens"], counts["completion_tokens"], counts["total_tokens"]) == wanted


def test_events_of_completions_are_joined() -> None:
    events: list[dict[str, Any]] = [
        {"id": "x", "choices": [{"index": 1, "text": "c"}]},
        {"choices": [{"index": 0, "text": "a", "logprobs": {"content": [1]}}]},
        {"choices": [{"index": 0, "text": "b", "logprobs": {"content": [2]}, "finish_reason": "stop"}]},
        {"choices": [{"index": 1, "text": "", "finish_reason": "length"}]},
    ]
    answer = text_completion(events)
    assert answer["object"] == "text_completion"
    assert [(choice["text"], choice["finish_reason"], choice["logprobs"]) for choice in answer["choices"]] == [
        ("ab", "stop", {"content": [1, 2]}),
        ("c", "length", None),
    ]


class Piece(str):
    """A text that fails the test when it is appended to another one, which copies both."""

    __slots__ = ()

    def __radd__(self, other: str) -> str:
        raise AssertionError(f"{self!r} is appended to {other!r}")


def test_long_texts_are_joined_once() -> None:
    function = {"name": Piece("f"), "arguments": Piece("a")}
    delta = {"content": Piece("a"), "reasoning": Piece("b"), "tool_calls": [{"index": 0, "function": function}]}
    [choice] = chat(chunk(0, delta), chunk(0, delta))["choices"]
    call = {"type": "function", "function": {"name": "ff", "arguments": "aa"}}
    assert choice["message"] == {"role": "assistant", "content": "aa", "reasoning": "bb", "tool_calls": [call]}
    event: dict[str, Any] = {"choices": [{"text": Piece("c")}]}
    assert text_completion([event, event])["choices"][0]["text"] == "cc"


@pytest.mark.parametrize(
    "events",
    [
        [],
        [{"choices": []}],
        [{"choices": [5]}],
        [{"choices": [{"delta": {"content": 5}}]}, {"choices": [{"delta": {"content": "a"}}]}],
        [{"choices": [{"delta": {"content": 5}}]}],
        [{"choices": [{"delta": {"tool_calls": [5]}}]}],
        [{"choices": [{"delta": {"tool_calls": [{"function": {"arguments": 5}}]}}]}],
        [{"choices": 5}],
        [{"choices": [{"delta": {"content": "a"}}], "usage": {"prompt_tokens": "many"}}, usage(1, 1)],
    ],
)
def test_malformed_event_is_a_bad_gateway_error(events: list[dict[str, Any]]) -> None:
    with pytest.raises(BadGatewayError, match="the engine's stream"):
        chat(*events)
