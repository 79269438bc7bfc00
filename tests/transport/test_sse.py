"""Server-sent events: cut at their boundaries, and not a byte changed."""

from __future__ import annotations

import asyncio
import re
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import BadGatewayError
from engine_plugin.transport import sse

if TYPE_CHECKING:
    from collections.abc import Iterable

END = re.compile(rb"\r?\n\r?\n\Z")


class Body:
    """An answer whose body comes in given pieces; b"" pieces are left out, as a client's would be."""

    status = 200
    complete = False

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]

    async def read_some(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    async def read(self, limit: int) -> bytes:
        raise NotImplementedError


async def blocks(*pieces: bytes) -> list[bytes]:
    return [block async for block in sse.whole_events(Body(pieces))]


STREAMS = {
    "llama.cpp": b'data: {"a":1}\n\n:\n\ndata: {"b":"x\\n\\ny"}\n\ndata: [DONE]\n\n',
    "windows": b"event: x\r\ndata: 1\r\n\r\n: ping\r\n\r\ndata: 2\r\ndata: 3\r\n\r\n",
    "mixed": b"data: 1\n\ndata: 2\r\n\r\ndata: 3\n\n",
}


@pytest.mark.promise("P25")
@pytest.mark.parametrize("name", STREAMS)
async def test_event_cut_at_any_byte_is_whole(name: str) -> None:
    stream = STREAMS[name]
    for cut in range(len(stream) + 1):
        found = await blocks(stream[:cut], stream[cut:])
        assert b"".join(found) == stream
        assert all(END.search(block) for block in found), cut
        assert len(found) <= 2


@pytest.mark.parametrize("name", STREAMS)
async def test_event_that_arrives_byte_by_byte_is_returned_when_complete(name: str) -> None:
    stream = STREAMS[name]
    found = await blocks(*(stream[at : at + 1] for at in range(len(stream))))
    assert found == re.findall(rb"(?:[^\r\n]+\r?\n)+\r?\n", stream)


async def test_complete_events_of_a_block_are_returned_together() -> None:
    assert await blocks(b"data: 1\n\ndata: 2\n\nda", b"ta: 3\n\n") == [b"data: 1\n\ndata: 2\n\n", b"data: 3\n\n"]


EVENTS = st.lists(
    st.tuples(
        st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), min_size=1, max_size=20), st.booleans()
    ),
    max_size=12,
)


@pytest.mark.promise("P25")
@given(events=EVENTS, cuts=st.lists(st.integers(0, 400), max_size=12))
def test_any_events_cut_anywhere_are_whole(events: list[tuple[str, bool]], cuts: list[int]) -> None:
    end = {True: b"\r\n\r\n", False: b"\n\n"}
    stream = b"".join(b"data: " + text.encode() + end[windows] for text, windows in events)
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    pieces = [stream[start:stop] for start, stop in pairwise(places)]
    found = asyncio.run(blocks(*pieces))
    assert b"".join(found) == stream
    assert all(END.search(block) for block in found)


@pytest.mark.promise("P26")
@pytest.mark.parametrize("rest", [b"data: {", b"data: 1", b"data: 1\n", b"x"])
async def test_stream_that_ends_inside_an_event_is_an_error(rest: bytes) -> None:
    events = sse.whole_events(Body([b"data: 0\n\n", rest]))
    assert await anext(aiter(events)) == b"data: 0\n\n"
    with pytest.raises(BadGatewayError, match="ended inside an event"):
        await anext(aiter(events))


async def test_empty_stream_and_empty_lines_have_no_events() -> None:
    assert await blocks() == []
    assert await blocks(b"\n") == []
    assert b"".join(await blocks(b"data: 1\n\n", b"\n")) == b"data: 1\n\n"


@pytest.mark.promise("P26")
async def test_event_above_the_limit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "_MAX_EVENT", 1000)
    with pytest.raises(BadGatewayError, match="an event of over 1000 bytes"):
        await blocks(*[b"x" * 100] * 20)


@pytest.mark.parametrize(
    ("block", "place"),
    [
        (b'data: {"error":{"code":400}}\n\n', 0),
        (b'error: {"code":500}\n\n', 0),
        (b'data: {"a":1}\n\ndata: {"error":{}}\n\n', 15),
        (b'data: {"a":1}\n\nid: 5\ndata: {"error":{}}\n\n', 15),
        (b'id: 5\r\ndata: {"error":{}}\r\n\r\n', 0),
        (b'data: 1\r\n\r\nid: 5\r\ndata: {"error":{}}\r\n\r\n', 11),
        (b'data: {"text":"data: {\\"error\\""}\n\n', -1),
        (b'data: {"text":"\\nerror: {"}\n\n', -1),
        (b'data: {"choices":[],"error":null}\n\n', -1),
        (b'data: {"a":1,"error":{"code":400}}\n\n', 0),
        (b'data: {"a":1}\r\rdata:{"error": "x"}\r\r', 15),
        (b'data: {"a":{"error":{}}}\n\n', -1),
        (b'data: {"token":"error"}\n\n', -1),
        (b'data: {"error":{"cut\n\n', 0),
        (b": error\n\n", -1),
        (b"", -1),
    ],
)
def test_start_of_an_error_event_is_found(block: bytes, place: int) -> None:
    assert sse.error_event(block) == place


@pytest.mark.parametrize(
    ("block", "place"),
    [
        (b"data: [DONE]\n\n", 14),
        (b"data:[DONE]\r\n\r\ndata: 1\n\n", 15),
        (b"data: 1\r\rdata: [DONE]\r\rdata: 2\r\r", 23),
        (b"data: [DONE]\n\ndata: [DONE]\n\n", 14),
        (b'data: {"a":"data: [DONE]"}\n\n', -1),
        (b": data: [DONE]\n\n", -1),
        (b"", -1),
    ],
)
def test_done_event_is_found(block: bytes, place: int) -> None:
    assert sse.after_done(block) == place


def test_data_of_an_event_is_joined() -> None:
    block = b'data: {"a":1}\n\n: ping\n\nevent: x\nid\r\n'
    block += b'data:{"b":"\xe2\x80\xa8"}\r\n\r\nerror: {"code":5}\n\ndata: [DONE]\n\n'
    assert list(sse.event_data(block)) == [{"a": 1}, {"b": "\u2028"}, {"error": {"code": 5}}]
    assert list(sse.event_data(b"")) == []


@pytest.mark.promise("P26")
@pytest.mark.parametrize("value", [b"{", b"", b"nul", b"\xff", b"[" * 100_000, b"5", b"[1]", b"null", b'"x"'])
def test_event_data_that_is_not_an_object_is_an_error(value: bytes) -> None:
    with pytest.raises(BadGatewayError, match="the engine's event is not"):
        list(sse.event_data(b"data: " + value + b"\n\n"))


async def test_time_of_an_event_grows_with_its_length() -> None:
    """Not with its square: a picture is one event of many blocks."""

    async def seconds(length: int) -> float:
        began = time.process_time()
        block = b"x" * 1000
        assert len(await blocks(*[block] * (length // 1000), b"\n\n")) == 1
        return time.process_time() - began

    await seconds(100_000)
    short = min([await seconds(250_000) for _ in range(5)])
    long = min([await seconds(4_000_000) for _ in range(2)])
    assert long < 80 * short  # 16 times as long; searched again for each block it takes over 200 times as long
