"""JSON texts from outside are read within bounds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.files import LARGEST_JSON, load_json, parse_json, read_json

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.promise("X8")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"[" + b"[]," * 5_000_000 + b"1]", "more than 500000 values"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "100 levels"),
        (b"[" * 100_000, "100 levels"),
        (b'"' + b"x" * LARGEST_JSON + b'"', "larger than 16 MiB"),
        (b"9" * 5000, "not valid JSON"),
        (b"NaN", "not a JSON number"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"", "not valid JSON"),
        (("[" * 5000).encode("utf-16"), "100 levels"),
    ],
    ids=["values", "objects", "lists", "bytes", "digits", "nan", "encoding", "empty", "utf-16"],
)
def test_what_exceeds_a_bound_is_refused_with_the_reason(tmp_path: Path, text: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(text)
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=why):
        load_json(path)
    assert read_json(path) is None


@pytest.mark.parametrize("text", ['{"a": "%s"}' % ("[{" * 5000), '["%s"]' % ('\\"[' * 5000), "[" * 100 + "]" * 100])
def test_brackets_in_strings_are_no_depth(text: str) -> None:
    assert parse_json(text.encode()) == json.loads(text)


def test_a_large_text_is_read() -> None:
    assert len(parse_json(b'{"a": "' + b"x" * (15 << 20) + b'"}')["a"]) == 15 << 20


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=10,
    )
)
def test_any_value_is_read_as_json_reads_it(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value
