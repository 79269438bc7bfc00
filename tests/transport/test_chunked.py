"""The chunked encoding, cut anywhere, in bulk and chunk by chunk."""

from __future__ import annotations

import os
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import BadGatewayError
from engine_plugin.transport.chunked import ChunkedBody

LINE = b'data: {"a":"' + b"x" * 200 + b'"}\n\n'
# What looks like the encoding itself, contents that end with parts of a line end, and events.
PIECES = st.sampled_from([b"\r\n", b"\r", b"\n", b"0\r\n\r\n", b"5\r\nhello\r\n", b"a", LINE, LINE * 3, b"y" * 3000])
FORMS = st.sampled_from(["%x", "%X", "%06x", "%x;a=b", "%x "])
CONTENTS = st.lists(st.lists(PIECES, min_size=1, max_size=4).map(b"".join), max_size=30)


def encoded(contents: list[bytes], form: str = "%x") -> bytes:
    return b"".join((form % len(content)).encode() + b"\r\n" + content + b"\r\n" for content in contents)


def decoded(blocks: list[bytes]) -> tuple[bytes, bytes, bool]:
    """Feed a decoder as a connection does: the content, what was not taken, and whether the body has ended."""
    body, content, rest = ChunkedBody(), b"", b""
    for block in blocks:
        more, took = body.take(rest + block)
        content, rest = content + more, (rest + block)[took:]
    return content, rest, body.ended


@given(
    CONTENTS, st.lists(st.integers(0, 100_000), max_size=6), st.sampled_from(["%x", "%X", "%06x", "%x;a=b", "%x "])
)
def test_content_is_the_same_wherever_it_is_cut(contents: list[bytes], places: list[int], form: str) -> None:
    data = encoded(contents, form) + b"0\r\nx-sum: 1\r\n\r\n"
    edges = sorted({0, len(data), *(place % len(data) for place in places)})
    blocks = [data[start:end] for start, end in pairwise(edges)]
    assert decoded([*blocks, b"HTTP/1.1"]) == (b"".join(contents), b"HTTP/1.1", True)


@pytest.mark.parametrize("contents", [[LINE] * 40, [LINE + b"\r\n"] * 40, [b"\r\n"] * 400])
def test_all_that_arrived_is_decoded_at_once(contents: list[bytes]) -> None:
    data = encoded(contents)
    assert decoded([data]) == (b"".join(contents), b"", False)
    content, _, _ = decoded([data[: len(data) - 10]])
    assert b"".join(contents).startswith(content)
    assert len(content) >= len(data) - sum(len(b"%x" % len(one)) + 4 for one in contents) - 10


@pytest.mark.parametrize("size", [b"+5", b"0x5", b"5_0", b"", b"-1", b"5 5", b"123456789", b"g"])
@pytest.mark.parametrize("before", [0, 40])
def test_size_that_is_not_valid_is_an_error(size: bytes, before: int) -> None:
    with pytest.raises(BadGatewayError, match="chunked encoding is broken"):
        decoded([encoded([LINE] * before) + size + b"\r\nhello\r\n" + encoded([LINE] * before)])


@pytest.mark.parametrize("before", [0, 40])
def test_chunk_longer_than_its_size_is_an_error(before: int) -> None:
    with pytest.raises(BadGatewayError, match="chunked encoding is broken"):
        decoded([encoded([LINE] * before) + b"5\r\nhello world\r\n" + encoded([LINE] * before)])


def test_line_and_trailer_that_do_not_end_are_errors() -> None:
    with pytest.raises(BadGatewayError, match="chunked encoding is broken"):
        decoded([b"5;" + b"x" * 2000])
    with pytest.raises(BadGatewayError, match="trailer that does not end"):
        decoded([b"0\r\n" + b"x: y\r\n" * 20_000])


@pytest.mark.parametrize("cut", [500, 1500, 2010])
def test_line_of_a_size_is_bounded_wherever_it_is_cut(cut: int) -> None:
    wire = b"5;" + b"x" * 2000 + b"\r\nhello\r\n0\r\n\r\n"
    with pytest.raises(BadGatewayError, match="chunked encoding is broken"):
        decoded([wire[:cut], wire[cut:]])


def test_no_content_is_kept_after_its_body() -> None:
    """Line ends within a chunk make its content look like the lines between chunks."""

    def decode() -> None:
        content = b"\r\n".join(os.urandom(20_000).replace(b"\r", b"") for _ in range(4))
        assert decoded([encoded([content, content])])[0] == content + content

    decode()
    tracemalloc.start()
    try:
        for _ in range(50):
            decode()
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
