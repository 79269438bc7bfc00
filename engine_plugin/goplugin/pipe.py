"""One TLS connection of a host, relayed to the plain gRPC server: handshake, then bytes both ways.

shaking ──► dialling ──► open ──► leaving ──► closed
   └── refused: leaving            (further bytes from the host are dropped)

This uses `ssl` with memory buffers instead of asyncio's TLS, which closes the whole connection when one side has
closed its half, and does not report why a client was rejected.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from enum import Enum, auto
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, TypeAlias

    Dial: TypeAlias = Callable[[Callable[[], asyncio.BufferedProtocol]], Coroutine[Any, Any, object]]

__all__ = ["Pipe", "Pipes"]

_HANDSHAKE = 10.0  # seconds; go-plugin hosts give a plugin no longer for its whole start
_STRANGERS = 32  # connections in the handshake; one more closes the oldest: silent clients cannot lock out the host
_LEAVING = 1.0  # seconds for the host to read the last bytes and close
_BUFFER = 1 << 16  # bytes
_RECORD = 1 << 14  # bytes; no TLS record holds more

_log = logging.getLogger(__name__)


class _State(Enum):
    SHAKING = auto()
    DIALLING = auto()
    OPEN = auto()
    LEAVING = auto()


class Pipes:
    """The connections of one server and what they share. Created and closed by `TlsServer`.

    A client must have one of the `trusted` certificates (DER). `dial` connects a protocol to the server.
    """

    def __init__(self, context: ssl.SSLContext, trusted: frozenset[bytes], dial: Dial) -> None:
        self.context = context
        self.trusted = trusted
        self.dial = dial
        self.open: set[Pipe] = set()
        self._strangers: dict[Pipe, None] = {}
        self._shut = False

    def add(self, pipe: Pipe) -> None:
        """Accept a connection; of too many without the host's certificate the oldest is closed."""
        self.open.add(pipe)
        if self._shut:  # accepted just before the close
            pipe.abort()
            return
        self._strangers[pipe] = None
        if len(self._strangers) > _STRANGERS:
            oldest = next(iter(self._strangers))
            self.known(oldest)
            _log.warning("more than %d TLS clients have shown no certificate; the oldest was cut off", _STRANGERS)
            oldest.abort()

    def known(self, pipe: Pipe) -> None:
        """Count `pipe` no longer among those that have shown no certificate."""
        self._strangers.pop(pipe, None)

    def remove(self, pipe: Pipe) -> None:
        """Remove `pipe`, which is closed."""
        self.known(pipe)
        self.open.discard(pipe)

    def shut(self) -> None:
        """Accept no further connections, and close those that have not shown the host's certificate."""
        self._shut = True
        for pipe in tuple(self._strangers):
            pipe.abort()

    async def close(self, grace: float) -> None:
        """Wait up to `grace` seconds for the connections to close, then close the rest."""
        self.shut()
        if self.open:
            await asyncio.wait({pipe.closed for pipe in self.open}, timeout=grace)
        while self.open:
            for pipe in tuple(self.open):
                pipe.abort()
            await asyncio.wait({pipe.closed for pipe in self.open})


class _End(asyncio.BufferedProtocol):
    """One of the two connections of a pipe. It is read no faster than the other one can be written."""

    transport: asyncio.Transport
    other: _End

    def __init__(self) -> None:
        self.connected = False
        self._buffer = memoryview(bytearray(_BUFFER))

    def abort(self) -> None:
        if self.connected:
            self.transport.abort()

    # Callbacks of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.connected = True

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._buffer

    def pause_writing(self) -> None:
        if self.other.connected:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other.connected:
            self.other.transport.resume_reading()

    def connection_lost(self, _exc: Exception | None) -> None:
        self.connected = False


class Pipe(_End):
    """The host's side of a connection; `inside` is the server's."""

    def __init__(self, pipes: Pipes) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.other = self.inside = _Inside(self)
        self._pipes = pipes
        self._state = _State.SHAKING
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = pipes.context.wrap_bio(self._received, self._to_send, server_side=True)
        self._dialling: asyncio.Task[None] | None = None
        self._host_done = False  # the host has closed its half; the server may still be answering
        self._timer: asyncio.TimerHandle

    def refuse(self, reason: str) -> None:
        """Reject this client."""
        _log.warning("a TLS client was rejected: %s", reason)
        self._leave()

    def abort(self) -> None:
        """Close both connections now; `closed` is set when that is done."""
        self._state = _State.LEAVING
        super().abort()
        self.inside.abort()
        if self._dialling is not None:
            self._dialling.cancel()

    # Callbacks of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._timer = self._loop.call_later(_HANDSHAKE, self.refuse, f"no handshake within {_HANDSHAKE:g} s")
        self._pipes.add(self)

    def buffer_updated(self, count: int) -> None:
        if self._state is _State.LEAVING:
            return
        self._received.write(self._buffer[:count])
        if self._state is _State.SHAKING:
            self._shake()
        elif self._state is _State.OPEN:
            self._decrypt()

    def eof_received(self) -> bool:
        """The host has closed the connection or its half. True keeps the other half open."""
        if self._state is not _State.LEAVING:
            self._received.write_eof()
        if self._state is _State.OPEN:
            self._decrypt()
        return self._state in (_State.DIALLING, _State.OPEN)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._state is _State.SHAKING:
            _log.debug("a client left in the middle of its TLS handshake: %s", exc)
        self._timer.cancel()
        self.abort()
        self._check_closed()

    # Callbacks of `_Inside`

    def server_connected(self) -> None:
        """The server accepted the connection; the host may have closed it meanwhile."""
        if self._state is not _State.DIALLING:
            self.inside.abort()
            return
        self._state = _State.OPEN
        self.transport.resume_reading()
        self._decrypt()  # bytes that arrived with the end of the handshake

    def encrypt(self, data: memoryview) -> None:
        """Send to the host."""
        if self._state is not _State.OPEN:
            return
        try:
            while data:
                data = data[self._tls.write(data) :]
        except ssl.SSLError as error:  # cannot happen: renegotiation is off
            _log.warning("the TLS connection broke: %s", error)
            self.abort()
        else:
            self._flush()

    def server_done(self) -> None:
        """The server has closed: gRPC never closes one half alone."""
        if self._state is _State.OPEN:
            try:
                self._tls.unwrap()
            except ssl.SSLError:  # the host need not have sent its close_notify
                pass
            self._leave()
        self._check_closed()

    # Steps

    def _shake(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as error:
            self.refuse(_explain(error))
            return
        # A certificate that the host's has signed is not accepted.
        if self._tls.getpeercert(binary_form=True) not in self._pipes.trusted:
            self.refuse("its certificate is not the host's")
        elif self._tls.selected_alpn_protocol() != "h2":
            self.refuse("it does not speak h2")
        else:
            self._flush()
            self._pipes.known(self)
            self._timer.cancel()
            self._state = _State.DIALLING
            self.transport.pause_reading()
            self._dialling = self._loop.create_task(self._dial())
            self._dialling.add_done_callback(lambda _task: self._check_closed())

    async def _dial(self) -> None:
        try:
            await self._pipes.dial(lambda: self.inside)
        except OSError as error:
            _log.error("the gRPC server behind TLS takes no connection: %s", error)
            self.abort()

    def _decrypt(self) -> None:
        parts = []
        try:
            while part := self._tls.read(_RECORD):
                parts.append(part)
            self._host_done = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._host_done = True
        except ssl.SSLError as error:  # truncated, or tampered with
            _log.debug("the host's TLS connection ended without close_notify: %s", error.reason)
            self.inside.transport.write(b"".join(parts))
            self.abort()
            return
        if parts:
            self.inside.transport.write(b"".join(parts))
        self._flush()
        if self._host_done:
            self.inside.end()

    def _flush(self) -> None:
        if self._to_send.pending:
            self.transport.write(self._to_send.read())

    def _leave(self) -> None:
        """Send close_notify and give the host time to close: a reset could discard bytes that it has not read."""
        self._state = _State.LEAVING
        self._flush()
        self.transport.write_eof()
        self.transport.resume_reading()
        self._timer.cancel()
        self._timer = self._loop.call_later(_LEAVING, self.abort)
        if self._host_done:
            self.transport.close()

    def _check_closed(self) -> None:
        dialling = self._dialling is not None and not self._dialling.done()
        if not (self.connected or dialling or self.inside.connected or self.closed.done()):
            self._pipes.remove(self)
            self.closed.set_result(None)


class _Inside(_End):
    """The server's side of a connection."""

    def __init__(self, outside: Pipe) -> None:
        super().__init__()
        self.other = self._outside = outside

    def end(self) -> None:
        """Send no more to the server."""
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:  # a TLS connection of asyncio
            self.transport.close()

    # Callbacks of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._outside.server_connected()

    def buffer_updated(self, count: int) -> None:
        self._outside.encrypt(self._buffer[:count])

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._outside.server_done()


def _explain(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not the host's ({error.verify_message})"
    return (error.reason or str(error)).replace("_", " ").lower()
