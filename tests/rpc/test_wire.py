"""Messages, timeouts, statuses and metadata as gRPC writes them into streams."""

from __future__ import annotations

import gzip
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.rpc.wire import (
    MessageReader,
    WireError,
    parse_end,
    parse_timeout,
    prefixed,
    trailers,
    write_timeout,
)

LIMIT = 1000


def read(reader: MessageReader, stream: bytes) -> list[tuple[bytes, int]]:
    reader.feed(stream)
    return taken(reader)


def taken(reader: MessageReader) -> list[tuple[bytes, int]]:
    messages = []
    while reader.messages:
        messages.append(reader.take())
    return messages


@pytest.mark.promise("G43")
@given(st.lists(st.binary(max_size=40), max_size=80), st.data())
def test_messages_cut_anywhere_are_whole(messages: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(prefixed, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    reader = MessageReader(LIMIT)
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reader.feed(stream[begin:end])
    assert taken(reader) == [(message, len(prefixed(message))) for message in messages]
    assert not reader.incomplete


@pytest.mark.parametrize("size", [LIMIT + 1, 2**32 - 1])
def test_message_beyond_the_limit_is_rejected_by_its_prefix(size: int) -> None:
    reader = MessageReader(LIMIT)
    with pytest.raises(WireError) as caught:
        reader.feed(b"\0" + size.to_bytes(4, "big"))
    assert caught.value.status == 8  # RESOURCE_EXHAUSTED


def compressed(message: bytes) -> bytes:
    data = gzip.compress(message)
    return b"\1" + len(data).to_bytes(4, "big") + data


def test_gzip_message_is_decompressed() -> None:
    reader = MessageReader(LIMIT)
    reader.unzips = True
    messages = read(reader, compressed(b"x" * LIMIT) + prefixed(b"plain") + compressed(b""))
    assert [data for data, _ in messages] == [b"x" * LIMIT, b"plain", b""]


@pytest.mark.parametrize(
    ("stream", "encoding", "status"),
    [
        (compressed(b"x" * (LIMIT + 1)), b"gzip", 8),
        (compressed(b"x" * 10_000_000), b"gzip", 8),
        (compressed(b"x"), b"identity", 13),
        (b"\2" + prefixed(b"x")[1:], b"gzip", 13),
        (b"\1" + prefixed(b"not gzip")[1:], b"gzip", 13),
        (b"\1" + prefixed(gzip.compress(b"x")[:-9])[1:], b"gzip", 13),
    ],
    ids=["too-long", "bomb", "no-encoding", "flag", "no-gzip", "cut"],
)
def test_message_that_cannot_be_decompressed_is_rejected(stream: bytes, encoding: bytes, status: int) -> None:
    reader = MessageReader(LIMIT)
    reader.unzips = encoding == b"gzip"
    with pytest.raises(WireError) as caught:
        read(reader, stream)
    assert caught.value.status == status


@pytest.mark.promise("G46")
def test_messages_not_taken_hold_only_what_arrived() -> None:
    """Nothing is decompressed, nor cut far, ahead of the reader."""
    tracemalloc.start()
    try:
        reader = MessageReader(50_000_000)
        reader.unzips = True
        reader.feed(compressed(bytes(50_000_000)) * 10)
        tiny = MessageReader(LIMIT)
        for _ in range(10):
            tiny.feed(prefixed(b"") * 10_000)
        assert tracemalloc.get_traced_memory()[0] < 5_000_000
    finally:
        tracemalloc.stop()
    assert len(taken(tiny)) == 100_000


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"1H", 3600),
        (b"2M", 120),
        (b"3S", 3),
        (b"4m", 0.004),
        (b"5u", 5e-6),
        (b"6n", 6e-9),
        (b"99999999H", 99999999 * 3600),
    ],
)
def test_timeout_is_parsed(text: bytes, seconds: float) -> None:
    assert parse_timeout(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", [b"", b"S", b"1", b"-1S", b"1.5S", b"100000000S", b"1s", "１S".encode()])
def test_malformed_timeout_is_no_timeout(text: bytes) -> None:
    assert parse_timeout(text) is None


@given(st.floats(0, 3e11))
def test_written_timeout_is_never_shorter(seconds: float) -> None:
    written = write_timeout(seconds)
    assert len(written) <= 9
    read = parse_timeout(written)
    assert read is not None
    assert read == pytest.approx(seconds, rel=1e-6, abs=1e-9) or seconds - 1e-6 <= read <= seconds + 3600


@given(st.integers(0, 16), st.text(st.characters(exclude_categories=["Cs"])))
def test_status_and_message_survive(status: int, details: str) -> None:
    written = trailers(status, details, {"error-id": "model-missing"})
    assert all(0x20 <= byte < 0x7F for _, value in written for byte in value)
    assert parse_end(written) == (status, details, {"error-id": "model-missing"})


def test_long_status_message_is_cut() -> None:
    written = trailers(2, "%" * 100_000, {})
    assert parse_end(written)[1] == "%" * 1333
    assert parse_end(trailers(2, "x" * 100_000, {}))[1] == "x" * 4000
    assert parse_end(trailers(2, "x" + "語" * 100_000, {}))[1] == "x" + "語" * 444


def test_trailers_without_a_valid_status_mean_unknown() -> None:
    assert parse_end([(b"x", b"1")])[0] == 2
    assert parse_end([(b"grpc-status", b"99999")])[0] == 2
    assert parse_end([(b"grpc-status", b"x")])[0] == 2


def test_binary_and_reserved_metadata_is_left_out() -> None:
    end = parse_end(
        [
            (b"grpc-status", b"0"),
            (b":status", b"200"),
            (b"grpc-status-details-bin", b"x"),
            (b"a-bin", b"y"),
            (b"a", b"1"),
            (b"a", b"2"),
        ]
    )
    assert end.metadata == {"a": "2"}
