"""Connections to an engine, and a stock of those that are opened before a request needs one."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import math
import os
import socket
import sys
import time
from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from engine_plugin.errors import UnavailableError
from engine_plugin.system.limits import NO_FILES, files_in_use

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Sequence

__all__ = ["CONNECTIONS_AHEAD", "CONNECT_TIMEOUT", "ROOM", "Connection", "Stock", "connect", "open_connection"]

ROOM = 64 * 1024
"""Bytes that are read from a socket at a time."""

CONNECTIONS_AHEAD = 8
"""The most connections that are opened ahead to a server that other programs use, too."""

CONNECT_TIMEOUT = 5.0
"""Seconds in which the engine must accept a connection."""

_HIGH_WATER = 2 * ROOM
"""Bytes that wait for their reader before the socket is paused."""
_LONGEST_PAUSE = 5.0
_FRESH = 2.0
"""Seconds after which an unused connection of a stock is closed. The shortest time after which a known server closes
one is 5 s."""
_PAUSE = 60.0
"""Seconds for which a stock stays empty after the server has closed or refused one of its connections."""


class Owner(Protocol):
    """What a connection belongs to."""

    heard: bool
    """Set whenever the engine sends bytes."""
    room: memoryview
    """Where all connections receive."""


class Connection(asyncio.BufferedProtocol):
    """One connection: the received bytes that its reader has not taken, and the one reader that waits."""

    def __init__(self, owner: Owner, sock: socket.socket) -> None:
        self._owner = owner
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport  # from `connection_made` on
        self.buffer = b""
        self.ended = False
        self.broken = False  # closed with an error
        self.since = 0.0
        """When it was opened, or became idle (time.monotonic)."""
        self._waiter: asyncio.Future[None] | None = None
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # asyncio's signature
        return self._owner.room  # filled and passed to `buffer_updated` in one step of the event loop

    def buffer_updated(self, nbytes: int) -> None:
        self.buffer += bytes(self._owner.room[:nbytes])
        self._owner.heard = True
        if len(self.buffer) >= _HIGH_WATER and not self._paused:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self.ended = True
        self._wake()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self.broken = exc is not None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def more(self) -> bool:
        """Wait for more bytes; False at the end of the connection."""
        if self.ended:
            return False
        if self._paused:
            self._paused = False
            self.transport.resume_reading()
        self._waiter = self._loop.create_future()
        before = len(self.buffer)
        try:
            await self._waiter
        finally:
            self._waiter = None
        return len(self.buffer) > before

    @property
    def usable(self) -> bool:
        """Whether it can carry a request, as far as the event loop knows."""
        return not self.ended and not self.buffer and not self.transport.is_closing()

    @property
    def untouched(self) -> bool:
        """Whether a connection that has carried nothing is as it was: the system has received neither its end nor,
        but for TLS's own, any bytes."""
        try:
            received = self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return bool(received) and self.transport.get_extra_info("sslcontext") is not None

    def abort(self) -> None:
        """Close it at once."""
        self.transport.abort()


class Stock:
    """Connections to one server that have carried nothing yet, for requests that need a new one each.

    While requests follow each other within `_FRESH` seconds, the next connection is opened in the background when one
    has been answered. There is one, or with concurrent requests up to `most`; an unused one is closed after `_FRESH`
    seconds. A server that closes or refuses them gets none for `_PAUSE` seconds.
    """

    def __init__(self, open_one: Callable[[], Awaitable[Connection]], most: int) -> None:
        """`open_one` opens a connection; it raises OSError."""
        self._open = open_one
        self._most = most
        self._wanted = 1
        self._fresh: deque[Connection] = deque()
        self._used_at = -math.inf
        self._in_use = False
        self._not_before = -math.inf
        self._filling: asyncio.Task[None] | None = None
        self._expiry: asyncio.TimerHandle | None = None

    def take(self) -> Connection | None:
        """The oldest connection, which the server has accepted first; None if there is none."""
        now = time.monotonic()
        found = self._oldest(now)
        self._in_use, self._used_at = now - self._used_at < _FRESH, now
        if found is None and self._filling is not None:
            self._wanted = min(self._wanted + 1, self._most)
        return found

    def fill(self) -> None:
        """Open connections in the background, if more requests are to be expected. Called after an answer."""
        self._used_at = time.monotonic()
        if self._in_use and self._filling is None and self._used_at >= self._not_before:
            self._filling = asyncio.create_task(self._fill())

    def close(self) -> None:
        """Close the connections. Further requests may fill the stock again."""
        if self._filling is not None:
            self._filling.cancel()
            self._filling = None
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        while self._fresh:
            self._fresh.popleft().abort()
        self._wanted, self._in_use, self._used_at = 1, False, -math.inf

    def _oldest(self, now: float) -> Connection | None:
        while self._fresh:
            connection = self._fresh.popleft()
            if not (connection.usable and connection.untouched):
                self._not_before = now + _PAUSE
            elif now < connection.since + _FRESH:
                return connection
            connection.abort()  # also when the event loop is late for `_expire`
        return None

    async def _fill(self) -> None:
        try:
            while len(self._fresh) < self._wanted:
                connection = await self._open()
                connection.since = time.monotonic()
                self._fresh.append(connection)
                if self._expiry is None:
                    self._expiry = asyncio.get_running_loop().call_later(_FRESH, self._expire)
        except OSError:  # a timeout, too; the next request that needs a connection reports the reason
            self._not_before = time.monotonic() + _PAUSE
        finally:
            if self._filling is asyncio.current_task():  # not after a close
                self._filling = None

    def _expire(self) -> None:
        """Close the connections that nobody has used, and expect fewer requests at once."""
        now = time.monotonic()
        self._expiry = None
        while self._fresh and now >= self._fresh[0].since + _FRESH:
            connection = self._fresh.popleft()
            if connection.ended:
                self._not_before = now + _PAUSE
            connection.abort()
            self._wanted = max(1, self._wanted - 1)
        if self._fresh:
            left = self._fresh[0].since + _FRESH - now
            self._expiry = asyncio.get_running_loop().call_later(left, self._expire)


async def connect(open_one: Callable[[], Awaitable[Connection]], retries: int, backoff: float) -> Connection:
    """Open a connection. A refused one is tried `retries` times more, after `backoff` seconds, doubled each time.

    Raises UnavailableError, with the OSError as its cause.
    """
    for left in range(retries, -1, -1):
        try:
            return await open_one()
        except TimeoutError:
            raise UnavailableError(f"the engine did not accept a connection in {CONNECT_TIMEOUT:g} s") from None
        except OSError as error:
            if not left or not isinstance(error, ConnectionRefusedError):
                reason = _reason(error)
                raise UnavailableError(f"the engine cannot be reached: {reason}", reason=reason) from error
        await asyncio.sleep(backoff)
        backoff = min(2 * backoff, _LONGEST_PAUSE)
    raise AssertionError("the last attempt returns or raises")


async def open_connection(
    owner: Owner, address: str | tuple[str, int], tls: ssl.SSLContext | None = None
) -> Connection:
    """Connect to a unix socket's path, or to (host, port), whose addresses are tried one by one. Raises OSError."""
    if isinstance(address, str):
        if sys.platform == "win32":
            raise OSError("Windows has no unix sockets")
        return await _open(owner, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), address, {})
    host, port = address
    options = {} if tls is None else {"ssl": tls, "server_hostname": host, "ssl_handshake_timeout": CONNECT_TIMEOUT}
    errors: list[OSError] = []
    for one in await _addresses(host, port):
        family = socket.AF_INET6 if ":" in one else socket.AF_INET
        try:
            sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            return await _open(owner, sock, (one, port), options)
        except OSError as error:
            errors.append(error)
    # A refusing server may be starting; any other failure of an address counts for all.
    raise next((error for error in errors if not isinstance(error, ConnectionRefusedError)), errors[0])


async def _open(owner: Owner, sock: socket.socket, address: Any, options: dict[str, Any]) -> Connection:
    loop = asyncio.get_running_loop()
    try:
        sock.setblocking(False)
        if not _connects_at_once(sock, address):
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await loop.sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return (await loop.create_connection(lambda: Connection(owner, sock), sock=sock, **options))[1]


def _connects_at_once(sock: socket.socket, address: Any) -> bool:
    """Whether a TCP connection is there already, as one within this machine is; else it is still to be awaited."""
    if sys.platform != "linux" or isinstance(address, str):  # elsewhere a refused socket cannot connect again
        return False
    return sock.connect_ex(address) == errno.EINPROGRESS and sock.connect_ex(address) in (0, errno.EISCONN)


async def _addresses(host: str, port: int) -> Sequence[str]:
    """The IP addresses of a host, at least one. Raises OSError."""
    if _is_address(host):
        return [host]
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # not valid as IDNA (RFC 5890)
        raise OSError(f"{host[:64]!a} is not a valid host name") from None
    return list(dict.fromkeys(str(address[0]) for *_kind, address in found))


@lru_cache
def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _reason(error: OSError) -> object:
    """The system's reason for a failed connection: asyncio's message has addresses but no reason."""
    if isinstance(error, ConnectionRefusedError):
        return os.strerror(errno.ECONNREFUSED)  # on Windows the errno is that of an invalid argument
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)
    if error.errno in NO_FILES:
        return files_in_use(error)
    return getattr(error, "verify_message", "") or error.strerror or error
