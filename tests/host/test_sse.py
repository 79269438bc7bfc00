"""Events are decoded whole wherever the bytes are cut."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import BadGatewayError
from engine_plugin.host import EventSplitter, events

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STREAM = (
    b"\xef\xbb\xbf: hello\n\n"
    b'data: {"a": "\xc3\xa9"}\n\n'
    b'event: x\r\nid: 7\r\ndata:{"b": 2}\r\n\r\n'
    b'data: {"c":\rdata:  3}\r\r'
    b"retry: 5\n\n"
    b": keep-alive\n"
    b'data: {"d": 4}\n\n'
    b"data: [DONE]\n\n"
    b'data: {"after": "the end"}\n\n'
)
EXPECTED = [{"a": "é"}, {"b": 2}, {"c": 3}, {"d": 4}]


async def arriving(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def decoded(*chunks: bytes) -> list[dict[str, Any]]:
    return [event async for event in events(arriving(*chunks))]


@pytest.mark.promise("P25")
@pytest.mark.parametrize("cut", range(len(STREAM) + 1))
async def test_event_cut_anywhere_is_whole(cut: int) -> None:
    assert await decoded(STREAM[:cut], STREAM[cut:]) == EXPECTED


@pytest.mark.promise("P25")
async def test_event_that_arrives_byte_by_byte_is_whole() -> None:
    assert await decoded(*(bytes([byte]) for byte in STREAM)) == EXPECTED


@pytest.mark.promise("P25")
@given(
    texts=st.lists(st.text()),
    ending=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    sizes=st.lists(st.integers(1, 9), min_size=1),
)
def test_any_text_in_any_pieces_is_whole(texts: list[str], ending: bytes, sizes: list[int]) -> None:
    stream = b"".join(b"data: " + json.dumps(text, ensure_ascii=False).encode() + ending * 2 for text in texts)
    # json.dumps escapes what would end a line, save for line separators that are not ASCII: those are no line ends.
    splitter = EventSplitter()
    found: list[bytes] = []
    position = 0
    while position < len(stream):
        size = sizes[position % len(sizes)]
        found += splitter.feed(stream[position : position + size])
        position += size
    found += splitter.close()
    assert [json.loads(data) for data in found] == texts


async def test_last_event_without_a_blank_line_is_decoded() -> None:
    assert await decoded(b'data: {"a": 1}\n') == [{"a": 1}]
    assert await decoded(b'data: {"a": 1}') == [{"a": 1}]
    assert await decoded(b'data: {"a": 1}\n\ndata: [DONE]') == [{"a": 1}]


async def test_empty_stream_has_no_events() -> None:
    assert await decoded() == []
    assert await decoded(b"", b"\n\n", b":\n\n") == []


@pytest.mark.parametrize("data", [b"<html>", b"[1]", b'"text"'])
async def test_event_that_is_not_an_object_is_an_error(data: bytes) -> None:
    with pytest.raises(BadGatewayError, match="not"):
        await decoded(b"data: " + data + b"\n\n")
