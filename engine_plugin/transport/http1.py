"""A lean HTTP/1.1 client for engines, over a unix socket, or TCP with or without TLS.

It undoes the chunked encoding and nothing more: no event is parsed. A slow reader pauses the socket (at 128 KiB),
so that a slow host slows down the engine; what arrives meanwhile is returned as one block, which coalesces events.
A block is small enough for the processor's cache, and for memory that the allocator reuses.

Protocol errors raise BadGatewayError; an engine that cannot be reached raises UnavailableError.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Protocol

from engine_plugin.errors import BadGatewayError
from engine_plugin.transport.chunked import ChunkedBody
from engine_plugin.transport.connections import ROOM, Connection, Stock, connect, open_connection

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

__all__ = ["BrokenOffError", "Http1Client", "HttpResponse", "Response"]

_MAX_HEAD = 64 * 1024
_FIRST_BYTES = b"HTTP/1."
_SAFE_METHODS = ("GET", "HEAD")
_KEEP_ALIVE = 4.0
"""Seconds after which an idle connection is closed, before the engine's own expiry, so that a request seldom meets a
connection that the engine is closing."""
_SPARE = 2
"""The most idle connections that are kept where only GET and HEAD reuse one; other requests need a new one."""
_BODY_ENDS_WITH_CONNECTION = -1


class BrokenOffError(BadGatewayError):
    """The engine closed the connection before its answer was complete: `did` says how, with the engine as subject.

    Callers that know the engine raise an error with its name.
    """

    def __init__(self, did: str) -> None:
        super().__init__(f"the engine {did}")
        self.did = did


class HttpResponse(Protocol):
    """An answer whose head has arrived."""

    status: int

    @property
    def complete(self) -> bool:
        """Whether the body was read to its end."""
        return False

    async def read_some(self) -> bytes:
        """The body bytes that have arrived, at least one; b"" at the end."""

    async def read(self, limit: int) -> bytes:
        """The whole body; BadGatewayError when it is longer than `limit` bytes."""
        blocks: list[bytes] = []
        size = 0
        while block := await self.read_some():
            size += len(block)
            if size > limit:
                raise BadGatewayError(f"the engine's answer is longer than {limit} bytes")
            blocks.append(block)
        return b"".join(blocks)


@dataclass(eq=False, repr=False)
class Http1Client:
    """An HTTP client for one engine process.

    `address` is a unix socket's path or (host, port); `headers` go with every request (the key). With `tls` the
    certificate must match the host.

    With `resend` a request is sent again if the engine closed an idle connection just before it. Without, only GET
    and HEAD reuse a connection, and no request is sent twice; up to `ahead` connections are then opened before other
    requests need them. A refused connection, over which nothing was sent, is retried `connect_retries` times, after
    `backoff` seconds, doubled each time.
    """

    address: str | tuple[str, int]
    headers: Mapping[str, str] = field(default_factory=dict)
    _: KW_ONLY
    tls: ssl.SSLContext | None = None
    resend: bool = True
    ahead: int = 0
    connect_retries: int = 0
    backoff: float = 0.25
    heard: bool = field(default=False, init=False)
    """Set whenever the engine sends bytes; the watcher clears it."""

    def __post_init__(self) -> None:
        address = self.address
        host = "localhost" if isinstance(address, str) else _host_field(*address, tls=self.tls is not None)
        lines = [f"host: {host}", *(f"{name}: {value}" for name, value in self.headers.items())]
        self._common = ("\r\n".join(lines) + "\r\n").encode("latin-1")
        self._idle: deque[Connection] = deque()
        self._stock = Stock(self._open, self.ahead) if self.ahead else None
        self.room = memoryview(bytearray(ROOM))
        """Where all connections receive."""

    def request(
        self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json"
    ) -> Response:
        """Prepare one exchange with the engine; nothing is sent yet."""
        head = f"{method} {path} HTTP/1.1\r\n".encode("latin-1") + self._common
        over_idle = self.resend or method in _SAFE_METHODS
        if body is None:
            return Response(self, head + b"\r\n", over_idle=over_idle)
        fields = f"content-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
        return Response(self, head + fields.encode("latin-1") + body, over_idle=over_idle)

    def close(self) -> None:
        """Close the idle and the unused connections."""
        if self._stock is not None:
            self._stock.close()
        while self._idle:
            self._idle.pop().abort()

    def _take_idle(self) -> Connection | None:
        oldest_good = time.monotonic() - _KEEP_ALIVE
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.since >= oldest_good:
                return connection
            connection.abort()
        return None

    def _give_back(self, connection: Connection) -> None:
        if not self.resend and len(self._idle) >= _SPARE:
            connection.abort()
            return
        connection.since = time.monotonic()
        self._idle.append(connection)
        while self._idle and self._idle[0].since < connection.since - _KEEP_ALIVE:
            self._idle.popleft().abort()

    def _close(self, connection: Connection, *, answered: bool) -> None:
        """Close a connection that is not kept; after an answer the next one may be opened."""
        connection.abort()
        if answered and self._stock is not None:
            self._stock.fill()

    async def _connect(self, *, stocked: bool) -> Connection:
        """An unused connection. Raises UnavailableError, with the OSError as its cause."""
        fresh = self._stock.take() if stocked and self._stock is not None else None
        return fresh or await connect(self._open, self.connect_retries, self.backoff)

    async def _open(self) -> Connection:
        return await open_connection(self, self.address, self.tls)


class Response(HttpResponse):
    """One exchange. Entering it sends the request and waits for the head of the answer.

    Leaving the block closes the connection unless the body was read to its end; the close stops the engine's work.
    `broken` says afterwards whether the engine closed it early.
    """

    def __init__(self, client: Http1Client, message: bytes, *, over_idle: bool = True) -> None:
        self._client = client
        self._message = message
        self._over_idle = over_idle
        self._connection: Connection | None = None
        self._chunks: ChunkedBody | None = None
        self._left = 0  # bytes of a body without chunks yet to arrive
        self._complete = False
        self._reusable = False
        self._given_up = False
        self.broken = True  # until connected
        self.status = 0
        self.headers: dict[str, str] = {}

    def give_up(self) -> None:
        """Close the connection at once. A pending read raises BadGatewayError.

        Called by another task than the reader, which a cancellation could hit at any await.
        """
        self._given_up = True
        if self._connection is not None:
            self._connection.abort()

    async def __aenter__(self) -> Self:
        connection = self._client._take_idle() if self._over_idle else None
        try:
            if connection is not None and await self._exchange(connection):
                return self
            self._require_wanted()
            # No idle connection, or the engine closed it just before the request arrived: no byte of an answer
            # came and the request changes nothing at the engine, so sending it once more is safe.
            connection = self._connection = await self._client._connect(stocked=not self._over_idle)
            self._require_wanted()
            if not await self._exchange(connection):
                self._require_wanted()
                raise BrokenOffError("closed the connection without an answer")
        except BaseException:
            self._release()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self.broken = connection.ended and not self._complete
        if self._complete and self._reusable and self._over_idle and connection.usable:
            self._client._give_back(connection)
        else:
            self._client._close(connection, answered=self._complete and not self._over_idle)

    def _require_wanted(self) -> None:
        if self._given_up:
            raise BadGatewayError("the request was given up")

    async def _exchange(self, connection: Connection) -> bool:
        self._connection = connection
        connection.transport.write(self._message)
        room = _MAX_HEAD
        while True:
            first = connection.buffer[: len(_FIRST_BYTES)]
            if not _FIRST_BYTES.startswith(first):  # at once: the end of such a head may never arrive
                raise _not_http(connection.buffer)
            end = connection.buffer.find(b"\r\n\r\n", 0, room)
            if end >= 0:
                head, connection.buffer = connection.buffer[:end], connection.buffer[end + 4 :]
                self._parse_head(head)
                if self.status >= 200:
                    return True
                room -= end + 4  # of interim answers (100 Continue), which must not go on for ever
                continue
            if len(connection.buffer) > room:
                raise BadGatewayError(f"the engine's answer has a head of over {_MAX_HEAD} bytes")
            if not await connection.more():
                if connection.buffer:
                    raise BrokenOffError("closed the connection inside the head of its answer")
                connection.abort()
                return False

    def _parse_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not _is_number(rest[:3], 3):
            raise _not_http(head)
        self.status = int(rest[:3])
        self.headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        encoding = self.headers.get("content-encoding", "identity").lower()
        if encoding not in ("", "identity"):
            raise BadGatewayError(
                f"the engine's answer is compressed ({encoding[:40]!r}), although the request did not accept it"
            )
        self._reusable = version == "HTTP/1.1" and "close" not in self.headers.get("connection", "").lower()
        chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        self._chunks = ChunkedBody() if chunked else None
        length = self.headers.get("content-length")
        if self.status in (204, 304) or chunked:
            self._left = 0
        elif length is not None:
            if not _is_number(length, 18):
                raise BadGatewayError(f"the engine's content-length is {length[:40]!r}")
            self._left = int(length)
        else:
            self._left, self._reusable = _BODY_ENDS_WITH_CONNECTION, False
        self._complete = self._left == 0 and (self.status in (204, 304) or not chunked)

    @property
    def complete(self) -> bool:
        return self._complete

    async def read_some(self) -> bytes:
        connection = self._connection
        while not self._complete:
            if connection is None:
                raise BadGatewayError("the answer was already closed")
            if connection.buffer:
                data, took = self._take(connection.buffer)
                connection.buffer = connection.buffer[took:]
                if data:
                    return data
            if not self._complete and not await connection.more():
                self._end_of_connection(in_order=not connection.broken)
        return b""

    def _end_of_connection(self, *, in_order: bool) -> None:
        self._require_wanted()
        if self._left != _BODY_ENDS_WITH_CONNECTION or not in_order:
            raise BrokenOffError("broke off in the middle of its answer")
        self._complete = True

    def _take(self, data: bytes) -> tuple[bytes, int]:
        """The content at the start of what has arrived, and how many bytes it took."""
        if self._chunks is not None:
            content, took = self._chunks.take(data)
            self._complete = self._chunks.ended
            return content, took
        if self._left != _BODY_ENDS_WITH_CONNECTION:
            data = data[: self._left]
            self._left -= len(data)
            self._complete = self._left == 0
        return data, len(data)


def _host_field(host: str, port: int, *, tls: bool) -> str:
    """The Host header (RFC 9110): brackets around IPv6, no default port."""
    try:
        name = host if host.isascii() else host.encode("idna").decode("ascii")
    except UnicodeError:  # it cannot be resolved
        name = ascii(host)
    name = f"[{name}]" if ":" in name else name
    return name if port == (443 if tls else 80) else f"{name}:{port}"


def _not_http(received: bytes) -> BadGatewayError:
    first = received[:80].partition(b"\r\n")[0]
    return BadGatewayError(f"the engine does not answer in HTTP: {first.decode('latin-1')!r}")


def _is_number(text: str, digits: int) -> bool:
    """Whether the text is 1 to `digits` ASCII digits."""
    return text.isascii() and text.isdigit() and len(text) <= digits
