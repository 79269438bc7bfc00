"""Lines of JSON in blocks that are cut anywhere."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import BadGatewayError
from engine_plugin.transport.ndjson import as_events, line_objects, read_line, split_lines, whole_lines
from engine_plugin.transport.sse import event_data

OBJECTS = st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=8) | st.integers(), max_size=3), max_size=6)


class Body:
    """An answer that arrives in these blocks."""

    status = 200
    complete = False

    def __init__(self, *blocks: bytes) -> None:
        self._blocks = [block for block in blocks if block]

    async def read_some(self) -> bytes:
        return self._blocks.pop(0) if self._blocks else b""

    async def read(self, limit: int) -> bytes:
        raise NotImplementedError


async def collected(*blocks: bytes, longest: int = 0) -> list[bytes]:
    return [block async for block in whole_lines(Body(*blocks), longest)]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(OBJECTS, st.lists(st.integers(0, 10_000), max_size=8), st.booleans())
async def test_lines_are_the_same_wherever_the_blocks_are_cut(
    objects: list[object], places: list[int], ended: bool
) -> None:
    data = "".join(json.dumps(shape, ensure_ascii=False) + "\n" for shape in objects).encode()
    if not ended:
        data = data.removesuffix(b"\n")
    blocks = await collected(*cut(data, places))
    assert all(block.endswith(b"\n") for block in blocks)
    joined = b"".join(blocks)
    assert list(line_objects(joined)) == objects
    if joined:
        assert list(event_data(as_events(joined))) == objects


async def test_stream_cut_at_any_byte_has_the_same_lines() -> None:
    data = '{"a":"\\n é"}\n{"b":{}}\n'.encode()
    for place in range(len(data) + 1):
        assert b"".join(await collected(data[:place], data[place:])) == data
    assert b"".join(await collected(*(data[at : at + 1] for at in range(len(data))))) == data


async def test_complete_lines_of_a_block_are_returned_together() -> None:
    assert await collected(b'{"a":1}\n{"b":2}\n{"c"', b":3}\n") == [b'{"a":1}\n{"b":2}\n', b'{"c":3}\n']


def test_empty_lines_and_carriage_returns_are_dropped() -> None:
    assert list(split_lines(b'\n\n{"a":\r1}\r\n\r\n\n \n{"b":2}\n\n')) == [b'{"a": 1}', b'{"b":2}']


async def test_body_that_ends_inside_a_line_is_an_error() -> None:
    assert await collected(b'{"a":1}') == [b'{"a":1}\n']
    with pytest.raises(BadGatewayError, match="inside a line"):
        await collected(b'{"a":1}\n{"b"')


async def test_line_above_the_limit_is_an_error() -> None:
    with pytest.raises(BadGatewayError, match="a line of over 10 bytes"):
        await collected(b'{"a":"', b"xxxxxxxxx", longest=10)


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000])
def test_line_that_is_not_an_object_is_an_error(line: bytes) -> None:
    with pytest.raises(BadGatewayError, match="the engine's line is not"):
        read_line(line)
