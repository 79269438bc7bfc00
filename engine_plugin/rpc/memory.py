"""A connection between two protocols of one process, without a socket."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["connect_in_memory"]


def connect_in_memory(server: asyncio.Protocol, client: asyncio.BufferedProtocol) -> None:
    """Connect the two protocols. Either receives at once what the other writes, in the same turn of the loop."""
    to_client, to_server = _End(), _End()
    to_client.join(to_server, client, lambda data: _fill(client, data))
    to_server.join(to_client, server, server.data_received)
    client.connection_made(to_server)  # what it writes now waits for the server
    server.connection_made(to_client)
    to_server.open()
    to_client.open()


def _fill(protocol: asyncio.BufferedProtocol, data: bytes | bytearray | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        buffer = memoryview(protocol.get_buffer(len(rest)))
        count = min(len(buffer), len(rest))
        buffer[:count] = rest[:count]
        protocol.buffer_updated(count)
        rest = rest[count:]


class _End(asyncio.Transport):
    """The transport of one protocol: what it writes, the protocol at the other end receives."""

    def __init__(self) -> None:
        super().__init__()
        self._other: _End
        self._reader: asyncio.BaseProtocol  # at the other end
        self._deliver: Callable[[Any], None]
        self._held: list[bytes] | None = []  # until both protocols are connected
        self._done = False  # writing
        self._closed = False

    def join(self, other: _End, reader: asyncio.BaseProtocol, deliver: Callable[[Any], None]) -> None:
        """Set the transport of the other end, its protocol, and what passes bytes to it."""
        self._other, self._reader, self._deliver = other, reader, deliver

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._done or self._closed:
            return
        if self._held is None:
            self._deliver(data)
        else:
            self._held.append(bytes(data))

    def open(self) -> None:
        """Deliver what was written so far, and from now on at once."""
        held, self._held = self._held or [], None
        for data in held:
            self._deliver(data)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not (self._done or self._closed):
            self._done = True
            if not self._reader.eof_received():  # type: ignore[attr-defined]  # both kinds of protocol have it
                self._other.close()

    def pause_reading(self) -> None:
        self._other.owner().pause_writing()

    def resume_reading(self) -> None:
        self._other.owner().resume_writing()

    def owner(self) -> asyncio.BaseProtocol:
        """The protocol whose transport this is."""
        return self._other._reader

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        if not self._closed:
            self._closed = self._other._closed = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self.owner().connection_lost, None)
            loop.call_soon(self._reader.connection_lost, None)

    abort = close
