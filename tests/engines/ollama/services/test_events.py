"""OpenAI's events from Ollama's lines: the fast path gives the same events as the parser."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.engines.ollama.events import ChoiceWriter, usage_event
from engine_plugin.errors import BadGatewayError

from .shapes import chat_line, data_of, joined, line

HEAD = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": 'a\\"1'}
TEXTS = st.text(max_size=6) | st.sampled_from(("<think>", "</think>", "<", "\\", '"', "\\1", "\n\n", "\\u003c"))
LINES = st.lists(st.tuples(st.sampled_from(("content", "thinking")), TEXTS), max_size=10)


def writer(service: str = "chat", *, tags: bool = True) -> ChoiceWriter:
    return ChoiceWriter(service, HEAD, 0, tags=tags)


def content_and_thinking(events: bytes, field: str = "content") -> tuple[str, str]:
    return joined(events, field), joined(events, "reasoning_content")


def encode(pieces: list[tuple[str, str]]) -> list[bytes]:
    lines = [chat_line(text) if kind == "content" else chat_line(thinking=text) for kind, text in pieces]
    return [*lines, chat_line(done=True, done_reason="stop")]


@pytest.mark.promise("P25")
@given(LINES, st.booleans(), st.integers(0, 12))
def test_blocks_of_any_size_give_the_same_text(pieces: list[tuple[str, str]], tags: bool, cut: int) -> None:
    lines = encode(pieces)
    spaced = [json.dumps(json.loads(data)).encode() + b"\n" for data in lines]  # always parsed
    slow, single, double = writer(tags=tags), writer(tags=tags), writer(tags=tags)
    by_lines = b"".join(slow.write(data) for data in spaced)
    assert content_and_thinking(b"".join(single.write(data) for data in lines)) == content_and_thinking(by_lines)
    cut = min(cut, len(lines))
    blocks = double.write(b"".join(lines[:cut])) + double.write(b"".join(lines[cut:]))
    assert content_and_thinking(blocks) == content_and_thinking(by_lines)
    if not tags:
        content, thinking = content_and_thinking(by_lines)
        assert content == "".join(text for kind, text in pieces if kind == "content")
        assert thinking == "".join(text for kind, text in pieces if kind == "thinking")


def test_events_of_a_chat() -> None:
    writes = writer()
    events = writes.write(chat_line("Hé") + chat_line(" <b>")) + writes.write(chat_line(' "x"\\1'))
    assert writes.last == {}
    last: dict[str, Any] = {
        "done_reason": "length",
        "prompt_eval_count": 3,
        "eval_count": 4,
        "eval_duration": 2_000_000_000,
    }
    events += writes.write(chat_line("!", done=True, **last))
    assert writes.last["eval_count"] == 4
    first, *texts, end = data_of(events)
    assert first == HEAD | {"choices": [choice({"role": "assistant", "content": ""})]}
    assert texts == [HEAD | {"choices": [choice({"content": text})]} for text in ("Hé", " <b>", ' "x"\\1', "!")]
    assert end["choices"] == [choice({}, "length")]
    assert end["timings"] == {
        "prompt_n": 3,
        "prompt_ms": 0,
        "prompt_per_second": 0,
        "predicted_n": 4,
        "predicted_ms": 2000,
        "predicted_per_second": 2,
        "load_ms": 0,
        "total_ms": 0,
    }


def choice(delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason} | more


def test_events_of_a_completion() -> None:
    writes = writer("generate")
    lines = [line(model="m", created_at="now", response=text, done=False) for text in ("a", " b")]
    lines.insert(0, line(model="m", created_at="now", response="", thinking="hm", done=False))
    last = line(model="m", created_at="now", response="", done=True, done_reason="stop", context=[1, 2])
    events = b"".join(writes.write(data) for data in lines) + writes.write(last)
    assert content_and_thinking(events, "text") == ("a b", "hm")
    shapes = [event["choices"][0] for event in data_of(events)]
    assert shapes[0] == {
        "index": 0, "text": "", "reasoning_content": "hm", "logprobs": None, "finish_reason": None
    }  # fmt: skip
    assert shapes[1] == {"index": 0, "text": "a", "logprobs": None, "finish_reason": None}
    assert shapes[-1] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    assert "timings" not in data_of(events)[-1]


def test_tool_calls_have_index_and_id() -> None:
    writes = writer()
    function = {"index": 0, "name": "look", "arguments": {"at": "é", "done": True}}
    lines = [
        message_line(tool_calls=[{"id": "call_1", "function": function}]),
        message_line(tool_calls=[{"function": {"index": 0, "name": "wait", "arguments": {}}}]),
        chat_line(done=True, done_reason="stop"),
    ]
    events = data_of(writes.write(b"".join(lines)))
    calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", [])]
    assert calls[0] == {
        "index": 0,
        "id": "call_1",
        "type": "function",
        "function": {"name": "look", "arguments": '{"at": "é", "done": true}'},
    }
    assert calls[1]["index"] == 1
    assert calls[1]["id"].startswith("call_")
    assert calls[1]["function"] == {"name": "wait", "arguments": "{}"}
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def message_line(**fields: Any) -> bytes:
    return line(model="m", created_at="now", message={"role": "assistant", "content": "", **fields}, done=False)


def test_logprobs_stay_with_their_text() -> None:
    writes = writer()
    events = writes.write(chat_line("<thi", logprobs=[{"token": "<thi", "logprob": -1}]))
    top = {"token": "s", "logprob": -2, "bytes": [115], "top_logprobs": [{"token": "x", "logprob": -3}]}
    events += writes.write(chat_line("s", logprobs=[top]))
    events += writes.write(chat_line(done=True, done_reason="stop"))
    _, held, end = (event["choices"][0] for event in data_of(events))
    assert held["delta"] == {"content": "<this"}
    assert held["logprobs"] == {"content": [{"token": "<thi", "logprob": -1, "bytes": None, "top_logprobs": []}, top]}
    assert end["logprobs"] is None


def test_error_follows_the_events_before_it() -> None:
    writes = writer()
    events = writes.write(chat_line("a <th") + line(error="out of memory") + chat_line("never"))
    assert joined(events) == "a <th"
    assert isinstance(writes.failure, BadGatewayError)
    assert "out of memory" in str(writes.failure)
    assert writes.last == {}


def test_lines_after_done_are_dropped() -> None:
    writes = writer()
    writes.write(chat_line("a"))
    events = writes.write(chat_line("b") + chat_line("c", done=True) + chat_line("never"))
    assert [event["choices"][0]["delta"].get("content") for event in data_of(events)][-2:] == ["c", None]


def test_tags_are_content_once_the_server_separates_thinking() -> None:
    writes = writer()
    events = writes.write(chat_line(thinking="hm")) + writes.write(chat_line("<think>is a tag</think>"))
    assert content_and_thinking(events) == ("<think>is a tag</think>", "hm")


@pytest.mark.parametrize(
    "data",
    [
        b"data: hello\n",
        b"hello\n",
        b"[1]\n",
        line(message="hello", done=False),
        line(message={"content": 5}),
        line(message={"tool_calls": [5]}),
        line(message={"tool_calls": [{"function": None}]}),
        line(message={}, logprobs={"a": 1}),
        line(message={}, done=True, eval_count="many"),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_malformed_lines_are_rejected(data: bytes, begun: bool) -> None:
    writes = writer()
    events = writes.write(chat_line("a")) if begun else b""
    events += writes.write(chat_line("b") + data)
    assert joined(events) == ("ab" if begun else "b")
    assert isinstance(writes.failure, BadGatewayError)
    assert "the engine's" in str(writes.failure)


def test_usage() -> None:
    lasts = [{"prompt_eval_count": 3, "eval_count": 4}, {"prompt_eval_count": 3, "eval_count": 5}]
    [event] = data_of(usage_event(HEAD, lasts, 2))
    assert event["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
    assert event["choices"] == []
    [event] = data_of(usage_event(HEAD, [{}], 1))
    assert event["usage"]["total_tokens"] == 0
