"""Requests of every service, and the JSON requests of the other calls."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import InvalidRequestError
from engine_plugin.server.payloads import model_name, model_names, pull_request
from engine_plugin.services import VALIDATORS, parse_request
from tests.abuse.examples import JSON
from tests.patience import pace

if TYPE_CHECKING:
    from collections.abc import Callable

FIELDS: dict[str, tuple[str, ...]] = {
    "chat": ("messages", "tools", "tool_choice", "response_format"),
    "generate": ("prompt",),
    "embed": ("input", "dimensions", "encoding_format"),
    "rerank": ("query", "documents", "top_n", "return_documents"),
}
READERS: dict[str, Callable[[bytes], object]] = {
    "model_name": model_name,
    "model_names": model_names,
    "pull_request": pull_request,
}
READ_FIELDS = (
    *("request_json", "model", "models", "name", "source", "sha256", "insecure", "username", "password"),
    "model_type",
)
GOOD: dict[str, bytes] = {
    "chat": b'{"messages":[{"role":"user","content":"a"}],"tools":[],"tool_choice":"auto","response_format":{}}',
    "generate": b'{"prompt":["a",[1,2]]}',
    "embed": b'{"input":["a",1,[1]],"dimensions":3,"encoding_format":"float"}',
    "rerank": b'{"query":"a","documents":["a",{"text":"b"}],"top_n":1,"return_documents":true}',
    "model_name": b'{"model":"a"}',
    "model_names": b'{"models":["a","b"]}',
    "pull_request": b'{"model":"a","source":"b","sha256":"c","insecure":true,"username":"d","password":"e"}',
}
SOON = 5.0


def judge(name: str, data: bytes) -> dict[str, Any] | None:
    """What a plugin does with a request before its engine sees it; None when it is refused, by its field."""
    try:
        if name in READERS:
            READERS[name](data)
            return {}
        request = parse_request(data)
        VALIDATORS[name].check(request)
    except InvalidRequestError as error:
        complaint = error.message
    else:
        return request
    assert len(complaint) < 1000
    field = complaint.partition(":")[0].partition("[")[0]
    assert field in (READ_FIELDS if name in READERS else ("request_data", *FIELDS[name]))
    return None


def take_or_refuse(name: str, data: bytes) -> None:
    """The same, soon; and what was taken can go on to an engine."""
    began = time.monotonic()
    request = judge(name, data)
    if request and name in VALIDATORS:
        trivial = VALIDATORS[name].trivial_answer(request | {"model": "m"})
        json.dumps(trivial, allow_nan=False)
        json.dumps(request, allow_nan=False)
    assert time.monotonic() - began < pace(SOON)


NAMES = st.sampled_from(sorted(GOOD))


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A name, and a request whose known fields hold anything."""
    name = draw(NAMES)
    known = READ_FIELDS if name in READERS else FIELDS[name]
    shape = json.loads(GOOD[name]) | draw(st.dictionaries(st.sampled_from(known), JSON, max_size=3))
    inner = draw(st.booleans())
    for value in shape.values():
        if inner and isinstance(value, list) and value:
            value[0] = draw(JSON)
    return name, json.dumps(shape, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@pytest.mark.promise("P23")
@given(requests())
def test_request_with_random_fields_is_accepted_or_rejected_by_field(request_: tuple[str, bytes]) -> None:
    take_or_refuse(*request_)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A good request with pieces cut out, put in, doubled or moved."""
    name = draw(NAMES)
    data = GOOD[name]
    for _ in range(draw(st.integers(1, 4))):
        start, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        piece = draw(
            st.sampled_from([b"", data[start:end] * 2, b"\0", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"NaN", b"1e999"])
            | st.sampled_from([b'"', b",", b"}", b"[" * 50, b'{"a":' * 50, b"\xef\xbb\xbf", b"-Infinity", b"\\u0000"])
            | st.binary(max_size=6)
        )
        data = data[:start] + piece + data[end:]
    return name, data


@pytest.mark.promise("P23")
@given(damaged())
def test_damaged_request_is_accepted_or_rejected_by_field(request_: tuple[str, bytes]) -> None:
    take_or_refuse(*request_)


HUGE = 300_000
MONSTERS: dict[str, bytes] = {
    "a long text": b'"' + b"x" * HUGE + b'"',
    "a long list": b"[" + b"0," * (HUGE // 2) + b"0]",
    "a list of lists": b"[" + b"[]," * (HUGE // 3) + b"[]]",
    "an object of many keys": b"{" + b",".join(b'"%d":0' % number for number in range(HUGE // 12)) + b"}",
    "one key again and again": b"{" + b'"a":0,' * (HUGE // 6) + b'"a":0}',
    "a long number": b"1" * HUGE,
    "a long fraction": b"0." + b"1" * HUGE,
    "a small number": b"1e-" + b"9" * 1000,
    "white space": b" " * HUGE + b"1",
    "escapes": b'"' + b"\\u00e9" * (HUGE // 6) + b'"',
    "half pairs": b'"' + b"\\ud800" * (HUGE // 6) + b'"',
}


@pytest.mark.promise("P23")
@pytest.mark.parametrize("monster", MONSTERS)
def test_field_of_megabytes_is_not_repeated_in_the_error(monster: str) -> None:
    """The request is accepted or rejected in bounded time."""
    for name, good in GOOD.items():
        for field in json.loads(good):
            take_or_refuse(name, b'{"model":"m","%b":%b}' % (field.encode(), MONSTERS[monster]))


def deepest(opening: bytes, closing: bytes) -> int:
    """Return how deep a request's field may be nested."""
    low, high = 0, 200_000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            parse_request(b'{"a":' + opening * middle + b"0" + closing * middle + b"}")
            low = middle
        except InvalidRequestError:
            high = middle
    return low


@pytest.mark.promise("P23")
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_deepest_accepted_nesting_can_be_reported_in_an_error(opening: bytes, closing: bytes) -> None:
    """Every value that can be read can also be quoted in an error."""
    limit = deepest(opening, closing)
    for name, good in GOOD.items():
        for field in json.loads(good):
            for depth in (*range(max(0, limit - 12), limit + 3), limit // 2):
                nested = opening * depth + b"0" + closing * depth
                judge(name, b'{"model":"m","%b":%b}' % (field.encode(), nested))
