"""JSON from outside: bounded in size, depth and values, and read without blocking other threads."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin import jsontext
from engine_plugin.errors import BadGatewayError, InvalidRequestError
from engine_plugin.jsontext import (
    BRIEF,
    MOST_BYTES,
    MOST_DEPTH,
    JsonError,
    answer_object,
    read_json,
    write_json,
    write_request,
)

LONG = b" " * BRIEF
"""White space in front makes a text one that is read as long ones are."""

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
WHOLE = st.text(alphabet=st.characters(codec="utf-8"))
VALUES = st.recursive(
    LEAVES | WHOLE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WHOLE, inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.promise("X8")
@pytest.mark.parametrize("before", [b"", LONG])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
def test_json_nested_deeper_than_100_levels_is_rejected(before: bytes, opening: bytes, closing: bytes) -> None:
    levels = MOST_DEPTH // len(closing)
    read_json(before + opening * levels + b"1" + closing * levels)
    for deeper in (levels + 1, levels * 50, levels * 5000):
        with pytest.raises(JsonError, match="nested more than 100 deep"):
            read_json(before + opening * deeper + b"1" + closing * deeper)


@pytest.mark.promise("X8")
def test_json_text_above_the_byte_limit_is_rejected() -> None:
    assert read_json(b"[" + b" " * 98 + b"]", 100) == []
    with pytest.raises(JsonError, match=r"has 101 bytes; the limit is 0 KiB"):
        read_json(b"[" + b" " * 99 + b"]", 100)
    with pytest.raises(JsonError, match=r"the limit is 256 MiB"):
        read_json(bytes(MOST_BYTES + 1))


@pytest.mark.promise("X8")
def test_json_text_above_the_value_limit_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsontext, "MOST_VALUES", BRIEF)
    assert len(read_json(b"[" + b"1," * (BRIEF - 1) + b"1]")) == BRIEF
    for inner in (b"1,", b"[],", b"{},", b'"",', b"[1],"):
        with pytest.raises(JsonError, match=f"holds more than {BRIEF} values"):
            read_json(b"[" + inner * BRIEF + b"1]")


@pytest.mark.promise("X8")
def test_other_threads_run_while_a_long_text_is_read() -> None:
    """A thread runs between the reader's steps; the standard library's decoder in C would block it to the end."""
    data = b"[" + b"[]," * 100_000 + b"[]]"
    reader = threading.Thread(target=read_json, args=(data,))
    turns = 0
    reader.start()
    while reader.is_alive():
        turns += 1
        time.sleep(0)
    assert turns > 2


@given(VALUES, st.sampled_from([b"", LONG]), st.booleans())
def test_any_json_value_survives_a_round_trip(value: Any, before: bytes, ascii_only: bool) -> None:
    assert read_json(before + json.dumps(value, ensure_ascii=ascii_only).encode()) == value
    assert read_json(write_json(value)) == value


@pytest.mark.promise("S11")
@pytest.mark.parametrize("before", [b"", LONG])
@pytest.mark.parametrize(
    ("written", "read"),
    [
        (rb'"a\ud83d"', "a\ufffd"),
        (rb'"\ude00b"', "\ufffdb"),
        (rb'"\uD83D\uD83D\uDE00"', "\ufffd\U0001f600"),
        (rb'"\ud83d\ude00"', "\U0001f600"),
        (rb'"\\ud83d"', r"\ud83d"),
        (rb'{"a\udfff": [{"b": "\udbff"}]}', {"a\ufffd": [{"b": "\ufffd"}]}),
    ],
)
def test_lone_surrogate_becomes_the_replacement_character(before: bytes, written: bytes, read: Any) -> None:
    assert read_json(before + written) == read


@pytest.mark.promise("X8")
def test_long_text_is_written_unchanged() -> None:
    plain, other = "A" * (1 << 20), "B/+=" * (1 << 18)
    value = {"a": [plain, "x", {"b": other, plain: plain}], "c": plain + "\n", "d": plain + "ä\ud83d", "e": 1}
    written = write_request(value)
    assert written == write_json(value)
    assert write_request([1, "a"]) == b'[1, "a"]'
    assert write_request({"text": "d\u00fcnn"}) == '{"text": "d\u00fcnn"}'.encode()


def test_request_that_cannot_be_encoded_is_rejected() -> None:
    nested: dict[str, Any] = {}
    for _ in range(100_000):
        nested = {"a": nested}
    with pytest.raises(InvalidRequestError, match=r"^request_data: is nested too deeply$"):
        write_request(nested)


@pytest.mark.promise("S11")
def test_written_json_is_utf_8() -> None:
    assert write_json({"a\ud83d": ["\udc00", "ä"]}).decode() == '{"a\ufffd": ["\ufffd", "ä"]}'


@pytest.mark.parametrize("answer", [b"", b"[]", b"null", b'"a"', b"{", b"[" * 100_000, b"\xff"])
def test_answer_that_is_not_an_object_is_a_bad_gateway_error(answer: bytes) -> None:
    with pytest.raises(BadGatewayError, match=r"^its answer is not a JSON object: "):
        answer_object(answer, "its answer")


def test_object_of_an_answer_is_read() -> None:
    assert answer_object(b' {"a": 1}\n') == {"a": 1}
