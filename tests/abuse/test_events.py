"""Server-sent events and the HTTP that brings them, cut anywhere and holding anything."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine_plugin.errors import BadGatewayError
from engine_plugin.host import EventSplitter, events
from engine_plugin.transport import sse
from tests.abuse.examples import JSON
from tests.examples import FEW

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

LINES = st.sampled_from(
    [
        *("data: 1", "data:2", "data", "data:", "data:  3", "data: a: b", "data: 🦙é\u2028\u0085", "data: [DONE]"),
        *(": comment", ":", "event: x", "id: 7", "retry: 5", "x", "dat: 4", " data: 5", "\ufeffdata: 6", "error: {}"),
        'data: {"error":{}}',
    ]
)
ENDS = st.sampled_from(["\n", "\n", "\r\n", "\r"])


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Events with every kind of line and line's end, and perhaps the last one open."""
    text = draw(st.sampled_from(["", "\ufeff"]))
    for _ in range(draw(st.integers(0, 6))):
        for line in draw(st.lists(LINES, max_size=3)):
            text += line + draw(ENDS)
        text += draw(ENDS)
    return (text + draw(st.sampled_from(["", "data: open", "data: open\n", "\r", "data"]))).encode()


EMPTY_LINE = re.compile(rb"[\r\n](?:\r\n|\r|\n)\Z")
CUTS = st.lists(st.integers(0, 200), max_size=10)


def cut(stream: bytes, places: Sequence[int]) -> list[bytes]:
    ends = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[start:end] for start, end in pairwise(ends)]


def every_cut(stream: bytes) -> list[list[bytes]]:
    """In two at each place, and byte by byte."""
    return [cut(stream, [place]) for place in range(len(stream) + 1)] + [cut(stream, range(len(stream)))]


def by_the_standard(stream: bytes) -> list[bytes]:
    """The data of each event: HTML Standard, section 9.2.6, written down word by word; an open event counts here."""
    found: list[bytes] = []
    data = b""
    lines = re.split(rb"\r\n|\r|\n", stream.removeprefix(b"\xef\xbb\xbf"))
    for line in [*lines, b""]:
        if not line and data:
            found.append(data.removesuffix(b"\n"))
            data = b""
        field, _, value = line.partition(b":")
        if field == b"data":
            data += value.removeprefix(b" ") + b"\n"
    return found


def split(pieces: list[bytes]) -> list[bytes]:
    splitter = EventSplitter()
    return [data for piece in pieces for data in splitter.feed(piece)] + splitter.close()


@pytest.mark.promise("P25")
@FEW
@given(streams())
@example(b"data: 1\r\r\ndata: 2\r\n\r\r\n\ndata: 3\n\r\ndata: 4")
@example(b"\xef\xbb")
def test_host_decodes_events_as_the_standard_wherever_they_are_cut(stream: bytes) -> None:
    expected = by_the_standard(stream)
    for pieces in every_cut(stream):
        assert split(pieces) == expected


@pytest.mark.promise("P25")
@given(st.binary(max_size=200) | st.text("data: \r\n{}1\ufeff").map(str.encode), CUTS)
def test_any_bytes_are_split_as_the_standard_requires(stream: bytes, places: list[int]) -> None:
    assert split(cut(stream, places)) == by_the_standard(stream)


class Body:
    """An engine's answer whose body comes in pieces."""

    status = 200
    complete = False

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]

    async def read_some(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    async def read(self, limit: int) -> bytes:
        raise NotImplementedError


def passed_on(pieces: list[bytes]) -> tuple[list[bytes], bool]:
    """The blocks that leave, and whether the stream ended inside an event."""

    async def collect() -> tuple[list[bytes], bool]:
        blocks: list[bytes] = []
        source = sse.whole_events(Body(pieces))
        try:
            while block := await anext(source, b""):
                blocks.append(block)
        except BadGatewayError:
            return blocks, True
        return blocks, False

    return asyncio.run(collect())


@pytest.mark.promise("P25")
@FEW
@given(streams())
@example(b"data: 1\n\r\ndata: 2\r\n\ndata: 3\r\r")
def test_engine_events_pass_whole_wherever_they_are_cut(stream: bytes) -> None:
    """Each block holds whole events, none is lost, and the end is judged the same."""
    whole, inside = passed_on([stream])
    expected = split(whole)
    for pieces in every_cut(stream):
        blocks, open_end = passed_on(pieces)
        assert open_end == inside
        assert stream.startswith(b"".join(blocks))
        assert split(blocks) == expected
        assert all(EMPTY_LINE.search(block) for block in blocks)
    if not inside:
        assert expected == by_the_standard(stream)


@pytest.mark.promise("P25")
@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\r\r", "\n\r\n", "\r\n\n"])
def test_event_is_passed_on_as_soon_as_it_is_complete(end: str) -> None:
    """However the engine ends its lines."""
    stream = [f"data: {number}{end}".encode() for number in range(3)]
    assert passed_on(stream) == (stream, False)


def as_events(shapes: list[str]) -> bytes:
    return "".join(f"data: {shape}\n\n" for shape in shapes).encode("utf-8", "surrogatepass")


@pytest.mark.promise("P26")
@given(st.binary(max_size=100) | streams() | st.lists(JSON.map(json.dumps)).map(as_events))
def test_any_event_is_an_object_or_a_bad_gateway(block: bytes) -> None:
    """Both in the plugin and in the host library."""
    place = sse.error_event(block)
    assert -1 <= place <= len(block)
    try:
        assert all(isinstance(shape, dict) for shape in sse.event_data(block))
    except BadGatewayError as error:
        complaint = error.message
        assert len(complaint) < 1000

    async def chunks() -> AsyncIterator[bytes]:
        yield block

    async def read() -> None:
        async for event in events(chunks()):
            assert isinstance(event, dict)

    try:
        asyncio.run(read())
    except BadGatewayError as error:
        complaint = error.message
        assert len(complaint) < 2000


@pytest.mark.promise("P26")
@pytest.mark.parametrize("value", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff" * 1000, b'"\\ud800"'])
async def test_event_with_unreadable_json_is_rejected_by_every_reader(value: bytes) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"data: " + value + b"\n\n"

    with pytest.raises(BadGatewayError):
        await anext(events(chunks()))
    with pytest.raises(BadGatewayError):
        list(sse.event_data(b"data: " + value + b"\n\n"))
