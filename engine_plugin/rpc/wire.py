"""What gRPC writes into HTTP/2 streams: messages, timeouts, statuses and metadata. For both sides.

Source: "gRPC over HTTP2" of the gRPC project.
"""

from __future__ import annotations

import zlib
from collections import deque
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote_to_bytes

from engine_plugin.rpc.status import GrpcStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "ENCODINGS",
    "End",
    "MessageReader",
    "WireError",
    "fitting",
    "parse_end",
    "parse_timeout",
    "prefixed",
    "trailers",
    "write_timeout",
]

ENCODINGS = frozenset({b"identity", b"gzip"})
"""Compressions of messages that are read; none is used for what is sent."""

_PREFIX = 5  # bytes: the compressed flag and the length
_AHEAD = 64  # messages that are cut before one is taken
_MOST_DETAILS = 4000
"""Bytes of a status's message as it is sent: grpcio's clients fail a call with over 8 KiB of headers."""
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_PLAIN = frozenset(range(0x20, 0x7F)) - {ord("%")}


class WireError(Exception):
    """A stream holds something other than messages. `status` is the gRPC status that ends the call."""

    def __init__(self, status: GrpcStatus, details: str) -> None:
        super().__init__(details)
        self.status = status
        self.details = details


def prefixed(message: bytes) -> bytes:
    """A message as a stream carries it, uncompressed."""
    return b"\0" + len(message).to_bytes(4, "big") + message


class MessageReader:
    """Cuts the bytes of one stream into messages of at most `limit` bytes, compressed and not.

    It cuts a few messages ahead and decompresses a message when it is taken, so that it holds little more than what
    arrived.
    """

    __slots__ = ("_buffer", "_limit", "messages", "unzips")

    def __init__(self, limit: int) -> None:
        self.unzips = False
        """Whether the stream's grpc-encoding is gzip, which its head says."""
        self.messages: deque[tuple[int, bytes]] = deque()
        """Messages that can be taken: the compressed flag and the content. Not empty while one is complete."""
        self._buffer = bytearray()
        self._limit = limit

    @property
    def incomplete(self) -> bool:
        """Whether bytes are left beside `messages`."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take bytes, which may begin and end anywhere. Raises WireError."""
        size = len(data) - _PREFIX
        whole = size == int.from_bytes(data[1:_PREFIX], "big")  # one message, as most often
        if whole and not self._buffer and len(self.messages) < _AHEAD:
            self._check_size(size)
            self.messages.append((data[0], data[_PREFIX:]))
            return
        self._buffer += data
        self._cut()

    def take(self) -> tuple[bytes, int]:
        """The next of `messages`, and the bytes that it took in the stream. Raises WireError."""
        flag, data = self.messages.popleft()
        if self._buffer and not self.messages:
            self._cut()
        return data if flag == 0 else self._unzipped(flag, data), _PREFIX + len(data)

    def _cut(self) -> None:
        buffer = self._buffer
        while len(buffer) >= _PREFIX and len(self.messages) < _AHEAD:
            end = _PREFIX + int.from_bytes(buffer[1:_PREFIX], "big")
            self._check_size(end - _PREFIX)
            if len(buffer) < end:
                return
            self.messages.append((buffer[0], bytes(memoryview(buffer)[_PREFIX:end])))
            del buffer[:end]

    def _unzipped(self, flag: int, data: bytes) -> bytes:
        if flag != 1 or not self.unzips:
            raise WireError(
                GrpcStatus.INTERNAL, f"a message has the compressed flag {flag} and no encoding that is read"
            )
        unzip = zlib.decompressobj(wbits=31)
        try:
            content = unzip.decompress(data, self._limit + 1)
        except zlib.error as error:
            raise WireError(GrpcStatus.INTERNAL, f"a message is not valid gzip: {error}") from error
        self._check_size(len(content))
        if not unzip.eof:
            raise WireError(GrpcStatus.INTERNAL, "a message ends before its gzip data does")
        return content

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            raise WireError(
                GrpcStatus.RESOURCE_EXHAUSTED, f"a message has {size} bytes or more; the limit is {self._limit}"
            )


def parse_timeout(value: bytes) -> float | None:
    """The seconds of a grpc-timeout header; None if it is malformed (then gRPC's servers set no deadline)."""
    digits, unit = value[:-1], _UNITS.get(value[-1:])
    if unit is None or not digits.isdigit() or len(digits) > 8:
        return None
    return int(digits) * unit


def write_timeout(seconds: float) -> bytes:
    """A grpc-timeout header, rounded up to the precision that its eight digits allow."""
    for unit, factor in ((b"n", 1e9), (b"u", 1e6), (b"m", 1e3), (b"S", 1.0), (b"M", 1 / 60), (b"H", 1 / 3600)):
        amount = max(0, -int(-seconds * factor // 1))
        if amount < 10**8:
            return b"%d%b" % (amount, unit)
    return b"99999999H"


def fitting(details: str) -> str:
    """As much of a status's message, from its start, as clients accept in a header."""
    left = _MOST_DETAILS
    for place, char in enumerate(details):
        left -= 1 if ord(char) in _PLAIN else 3 * len(char.encode("utf-8", "replace"))
        if left < 0:
            return details[:place]
    return details


def trailers(status: int, details: str, metadata: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """The headers that end a call; `metadata` is printable ASCII."""
    headers = [(b"grpc-status", b"%d" % status)]
    if details:
        text = fitting(details).encode("utf-8", "replace")
        quoted = b"".join(bytes((byte,)) if byte in _PLAIN else b"%%%02X" % byte for byte in text)
        headers.append((b"grpc-message", quoted))
    headers.extend((name.encode(), value.encode("ascii", "replace")) for name, value in metadata.items())
    return headers


class End(NamedTuple):
    """How a call ended: gRPC's status (0: OK), its message, and the text values of the trailing metadata."""

    status: int
    details: str
    metadata: dict[str, str]


def parse_end(headers: Iterable[tuple[bytes, bytes]]) -> End:
    """Read trailers. Without a valid grpc-status the status is UNKNOWN; of repeated keys the last value counts."""
    status, details, metadata = None, "", {}
    for name, value in headers:
        if name == b"grpc-status":
            status = int(value) if value.isdigit() and len(value) < 4 else GrpcStatus.UNKNOWN
        elif name == b"grpc-message":
            details = unquote_to_bytes(value).decode("utf-8", "replace")
        elif not name.startswith((b":", b"grpc-")) and not name.endswith(b"-bin"):
            metadata[name.decode("ascii", "replace")] = value.decode("utf-8", "replace")
    if status is None:
        return End(GrpcStatus.UNKNOWN, "the server ended the call without a status", metadata)
    return End(status, details, metadata)
