"""Reading a request: any bytes give a dict or an error that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services import parse_request
from engine_plugin.services.base import optional, require

WHOLE = st.characters(codec="utf-8")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=WHOLE),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet=WHOLE), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.promise("P23")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty; it must hold a JSON object"),
        (b" ", "is not JSON: Expecting value at line 1, column 2"),
        (b"{", "is not JSON"),
        (b'{"a":1}x', "is not JSON: Extra data at line 1, column 8"),
        (b"\xff\xfe{}", r"is not UTF-8 \(byte 0\)"),
        (b'{"a":"\xc3"}', r"is not UTF-8 \(byte 6\)"),
        (b'{"a":"\xed\xa0\x80"}', r"is not UTF-8 \(byte 6\)"),
        ('{"a":1}'.encode("utf-16"), "is not UTF-8"),
        ('{"a":1}'.encode("utf-16-le"), "is not JSON"),
        ('{"a":1}'.encode("utf-32"), "is not UTF-8"),
        (b'{"a":NaN}', "is not JSON: NaN is not a JSON number"),
        (b'{"a":-Infinity}', "is not JSON: -Infinity is not a JSON number"),
        (b'{"a":1e999}', "is not JSON: 1e999 is too large a number"),
        (b'{"a":-1e999}', "is not JSON: -1e999 is too large a number"),
        (b'{"a":' + b"1" * 5000 + b"}", "is not JSON: .*digits"),
        (b'{"a":' * 100_000, "is nested more than 100 deep"),
        (b"[" * 100_000 + b"]" * 100_000, "is nested more than 100 deep"),
        (b"[]", "must hold a JSON object, not a list"),
        (b'"a"', "must hold a JSON object, not a string"),
        (b"1", "must hold a JSON object, not an integer"),
        (b"1.5", "must hold a JSON object, not a number"),
        (b"true", "must hold a JSON object, not true or false"),
        (b"null", "must hold a JSON object, not null"),
    ],
)
def test_non_object_body_is_rejected(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^request_data: {message}"):
        parse_request(data)


def test_byte_order_mark_is_skipped() -> None:
    assert parse_request(b'\xef\xbb\xbf{"a":1}') == {"a": 1}


def test_error_names_the_field() -> None:
    with pytest.raises(InvalidRequestError, match=r"^request_json: is empty"):
        parse_request(b"", "request_json")


def assert_object_or_error(data: bytes) -> None:
    outcome: object
    try:
        outcome = parse_request(data)
    except InvalidRequestError as error:
        outcome = error.message
    assert isinstance(outcome, dict) or str(outcome).startswith("request_data: ")


@pytest.mark.promise("P23")
@given(st.binary())
def test_arbitrary_bytes_are_an_object_or_rejected(data: bytes) -> None:
    assert_object_or_error(data)


@given(st.binary(max_size=8), st.integers(0, 40))
def test_objects_with_noise_are_an_object_or_rejected(noise: bytes, place: int) -> None:
    """Random bytes inside a valid request."""
    good = b'{"messages":[{"role":"user","content":"\xc3\xa4"}]}'
    assert_object_or_error(good[:place] + noise + good[place:])


@given(st.dictionaries(st.text(alphabet=WHOLE), JSON, max_size=5))
def test_any_object_is_read_unchanged(request_: dict[str, Any]) -> None:
    for ascii_only in (True, False):
        data = json.dumps(request_, ensure_ascii=ascii_only).encode()
        assert parse_request(data) == request_


@pytest.mark.parametrize(
    ("value", "types", "message"),
    [
        (None, (str,), "a: is missing; it must be a string"),
        (1, (str,), r"a: must be a string, not an integer \(1\)"),
        (True, (int,), r"a: must be an integer, not true or false \(true\)"),
        (1.5, (int,), r"a: must be an integer, not a number \(1\.5\)"),
        ({}, (str, list), r"a: must be a string or a list, not an object \(\{\}\)"),
        (["x" * 100], (str,), r'a: must be a string, not a list \(\["x{58}\)'),
    ],
)
def test_field_of_the_wrong_type_is_rejected(value: Any, types: tuple[type, ...], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{message}$"):
        require({"a": value}, "a", *types)


def test_fields_of_the_right_type_are_returned() -> None:
    assert require({"a": 1}, "a", int) == 1
    assert require({"a": False}, "a", bool) is False
    assert require({"a": ""}, "a", str) == ""
    assert optional({}, "a", int) is None
    assert optional({"a": None}, "a", int) is None
    assert optional({"a": [1]}, "a", str, list) == [1]
