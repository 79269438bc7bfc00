"""What an engine may send instead of HTTP: bombs, contradictions, and answers that never come to an end."""

from __future__ import annotations

import asyncio
import contextlib
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import BadGatewayError
from tests.examples import FEW
from tests.transport.test_http1 import CHUNKED, fetch, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.transport.test_http1 import Answer, Call

OK = b"HTTP/1.1 200 OK\r\n"
BLOCK = 64 * 1024
LOT = 48 * 1024 * 1024
LITTLE = 12 * 1024 * 1024


def endless(head: bytes, block: bytes, sent: list[int]) -> Answer:
    """Sends the head, then the block again and again, far more than a server should hold in memory."""

    async def answer(call: Call) -> bool:
        call.writer.write(head)
        repeated = block * max(1, BLOCK // len(block))
        while sent[0] < LOT:
            call.writer.write(repeated)
            sent[0] += len(repeated)
            await call.writer.drain()
        return False

    return answer


BOMBS: dict[str, tuple[bytes, bytes]] = {
    "a head of many lines": (OK, b"x: y\r\n"),
    "one header line": (OK + b"x: ", b"y" * 1000),
    "a status line": (b"HTTP/1.1 200 ", b"O" * 1000),
    "no line at all": (b"", b"\0" * 1000),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a chunk's extension": (CHUNKED + b"5;", b"x" * 1000),
    "a chunk's size": (CHUNKED, b"0" * 1000),
    "a trailer": (CHUNKED + b"0\r\n", b"x: y\r\n"),
    "chunks of one byte": (CHUNKED, b"1\r\nx\r\n"),
    "a chunk of gigabytes": (CHUNKED + b"ffffffff\r\n", b"x" * 1000),
    "a body of an absurd length": (OK + b"content-length: 999999999999999999\r\n\r\n", b"x" * 1000),
    "a body without a length": (OK + b"\r\n", b"x" * 1000),
}


@pytest.mark.promise("P26")
@pytest.mark.parametrize("name", BOMBS)
async def test_endless_answer_is_a_bad_gateway_in_bounded_memory(name: str) -> None:
    """The caller sets the bound."""
    sent = [0]
    async with serving("tcp", Path(), endless(*BOMBS[name], sent)) as (_, client):
        tracemalloc.start()
        try:
            with pytest.raises(BadGatewayError, match="the engine") as refused:
                await fetch(client, limit=1 << 16)
            assert tracemalloc.get_traced_memory()[1] < LITTLE
        finally:
            tracemalloc.stop()
        assert len(refused.value.message) < 400
        assert sent[0] < LOT, "all of it was read"


TOKENS = st.sampled_from(
    [
        *(
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.0 200\r\n",
            b"HTTP/1.1 204 X\r\n",
            b"HTTP/1.1 100 X\r\n\r\n",
            b"HTTP/9 200 X\r\n",
        ),
        *(b"content-length: 5\r\n", b"content-length: 3\r\n", b"Content-Length: +5\r\n", b"content-length:\r\n"),
        *(b"transfer-encoding: chunked\r\n", b"transfer-encoding: gzip, chunked\r\n", b"connection: close\r\n"),
        *(b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"x", b": y\r\n", b" folded\r\n", b"\xff\xfe: \x80\r\n"),
        *(
            b"hello",
            b"5\r\nhello\r\n",
            b"5\r\nhel",
            b"0\r\n\r\n",
            b"0\r\nx: y\r\n\r\n",
            b"-1\r\n",
            b"5 \r\nhello\r\n",
        ),
        *(b"data: 1\n\n", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
    ]
)


def pieces(wire: bytes, sizes: list[int]) -> Iterator[bytes]:
    at = 0
    for size in sizes:
        yield wire[at : at + size]
        at += size
    yield wire[at:]


@pytest.mark.promise("P25", "P26")
@FEW
@given(st.lists(TOKENS, max_size=10).map(b"".join), st.lists(st.integers(1, 20), max_size=12))
def test_malformed_http_has_the_same_outcome_wherever_it_is_cut(wire: bytes, sizes: list[int]) -> None:
    async def outcome(*parts: bytes) -> tuple[int, bytes] | None:
        async def answer(call: Call) -> bool:
            await call.send(*parts)
            return False

        async with serving("tcp", Path(), answer) as (_, client):
            with contextlib.suppress(BadGatewayError):
                return await fetch(client)
        return None

    async def play() -> None:
        whole = await outcome(wire)
        assert await outcome(*(part for part in pieces(wire, sizes) if part)) == whole

    asyncio.run(play())


@pytest.mark.promise("P26")
@FEW
@given(st.lists(TOKENS, max_size=6).map(b"".join))
def test_answer_of_the_wrong_length_does_not_leak_into_the_next(first: bytes) -> None:
    """An engine that sends more or less than Content-Length fails only its own call."""
    good = OK + b"content-length: 4\r\n\r\nnext"

    async def play() -> None:
        answers: list[Callable[[], bytes]] = [lambda: first, *[lambda: good] * 3]

        async def answer(call: Call) -> bool:
            await call.send(answers.pop(0)() if answers else good)
            return True

        async with serving("tcp", Path(), answer) as (_, client):
            with contextlib.suppress(BadGatewayError, TimeoutError):
                async with asyncio.timeout(0.05):
                    await fetch(client)
            answers.clear()
            assert await fetch(client) == (200, b"next")

    asyncio.run(play())
