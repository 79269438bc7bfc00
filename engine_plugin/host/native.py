"""Channels on HTTP/2 connections of this package."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import ngh2
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from engine_plugin.host.seam import CallEnded, RpcFailure
from engine_plugin.rpc.http2 import Connection, Stream, StreamEnded
from engine_plugin.rpc.status import GrpcStatus
from engine_plugin.rpc.wire import MessageReader, WireError, parse_end, prefixed, write_timeout
from engine_plugin.system.addresses import host_of, unix_path

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

    from google.protobuf.descriptor import MethodDescriptor
    from google.protobuf.message import Message

    from engine_plugin.rpc.http2 import Headers
    from engine_plugin.system.certificates import Identity

__all__ = ["NativeChannel", "client_context"]

_LONGEST = (1 << 31) - 1  # bytes of a message: protobuf's limit
_CANCEL = 8  # HTTP/2's code for a stream that is no longer needed

_LATE = "the deadline of the call has passed"

# "Errors" in "gRPC over HTTP2": the status of a call whose stream was reset with a code.
_OF_RESETS = {
    7: GrpcStatus.UNAVAILABLE,
    8: GrpcStatus.CANCELLED,
    11: GrpcStatus.RESOURCE_EXHAUSTED,
    12: GrpcStatus.PERMISSION_DENIED,
}
# "HTTP to gRPC status code mapping", for servers or proxies that do not speak gRPC.
_OF_HTTP = {
    b"400": GrpcStatus.INTERNAL,
    b"401": GrpcStatus.UNAUTHENTICATED,
    b"403": GrpcStatus.PERMISSION_DENIED,
    b"404": GrpcStatus.UNIMPLEMENTED,
    **dict.fromkeys((b"429", b"502", b"503", b"504"), GrpcStatus.UNAVAILABLE),
}


class _ClientStream(Stream):
    """The stream of a call: keeps its messages, and its end."""

    __slots__ = ("_arrival", "_reader", "_timer", "complete", "outcome")

    def __init__(self, connection: Connection, number: int) -> None:
        super().__init__(connection, number)
        self._reader = MessageReader(_LONGEST)
        self._arrival: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.complete = False
        """Whether the request was sent to its end."""
        self.outcome: RpcFailure | None = None
        """How the call ended; its status may be 0."""

    async def message(self) -> bytes | None:
        """The next message; None at the end."""
        messages = self._reader.messages
        while not messages:
            if self.outcome is not None:
                if self._reader.incomplete and not self.outcome.status:
                    self.outcome = RpcFailure(GrpcStatus.INTERNAL, "the server ended the call within a message")
                return None
            self._arrival = self.connection.loop.create_future()
            await self._arrival
        try:
            data, size = self._reader.take()
        except WireError as error:
            self.abandon(error.status, error.details)
            self.outcome = RpcFailure(error.status, error.details)  # whatever status the server sent
            return None
        self.consumed(size if messages else None)
        return data

    def finish_with(self, status: int, details: str = "", metadata: Mapping[str, str] | None = None) -> None:
        """Note how the call ended, once."""
        if self.outcome is None:
            self.outcome = RpcFailure(status, details, metadata)
            if self._timer is not None:
                self._timer.cancel()
            if self._arrival is not None and not self._arrival.done():
                self._arrival.set_result(None)

    def end_with(self, headers: Headers) -> None:
        """Note how the server ended the call; what is left of the request is not sent."""
        self.finish_with(*parse_end(headers))
        if not self.complete:
            self.reset(_CANCEL)

    def end_at(self, deadline: float) -> None:
        """End the call at a time of the event loop's clock."""
        self._timer = asyncio.get_running_loop().call_at(deadline, self.abandon, GrpcStatus.DEADLINE_EXCEEDED, _LATE)

    def abandon(self, status: int, details: str) -> None:
        """End the call from this side, once."""
        if self.outcome is None:
            self.finish_with(status, details)
            self.reset(_CANCEL)

    def on_headers(self, headers: Headers, *, ended: bool) -> None:
        fields = dict(headers)
        if (http := fields.get(b":status")) != b"200":
            status = _OF_HTTP.get(http or b"", GrpcStatus.UNKNOWN)
            self.abandon(status, f"the server answered with HTTP status {(http or b'').decode('ascii', 'replace')}")
        elif not fields.get(b"content-type", b"").startswith(b"application/grpc"):
            self.abandon(GrpcStatus.UNKNOWN, "the server does not speak gRPC")
        elif ended:
            self.end_with(headers)
        else:
            self._reader.unzips = fields.get(b"grpc-encoding") == b"gzip"

    def on_data(self, data: bytes, *, ended: bool) -> None:
        if self.outcome is not None:
            self.consumed()
            return
        try:
            self._reader.feed(data)
        except WireError as error:
            self.abandon(error.status, error.details)
            return
        if not self._reader.messages:
            self.consumed()  # else a message longer than the window would never be complete
        if ended:
            self.finish_with(GrpcStatus.INTERNAL, "the server ended the call without a status")
        elif self._arrival is not None and not self._arrival.done() and self._reader.messages:
            self._arrival.set_result(None)

    def on_trailers(self, headers: Headers) -> None:
        self.end_with(headers)

    def on_closed(self, code: int | None) -> None:
        if code is None:
            self.finish_with(GrpcStatus.UNAVAILABLE, "the connection was lost")
        elif code == _CANCEL and self._timer is not None and self._timer.when() <= self.connection.loop.time():
            self.finish_with(GrpcStatus.DEADLINE_EXCEEDED, _LATE)  # servers reset such calls, too
        else:
            self.finish_with(_OF_RESETS.get(code, GrpcStatus.INTERNAL), f"the server reset the call with code {code}")


class _NativeCall:
    """One call. Without a connection, a task begins it once there is one."""

    __slots__ = ("_answer", "_beginning", "_stream")

    def __init__(self, answer: type[Message]) -> None:
        self._answer = answer
        self._stream: _ClientStream | None = None
        self._beginning: asyncio.Task[_ClientStream] | None = None

    def begin(
        self, connection: Connection, headers: list[tuple[bytes, bytes]], data: bytes | None, deadline: float | None
    ) -> _ClientStream:
        """Send the head, and the request of a call that has one. Raises RpcFailure."""
        try:
            stream = connection.request(headers, _ClientStream)
        except StreamEnded as error:
            raise RpcFailure(GrpcStatus.UNAVAILABLE, "the connection was lost") from error
        if data is not None:
            stream.complete = True
            stream.send_data(data, end=True)
        else:
            connection.flush_soon()
        if deadline is not None:
            stream.end_at(deadline)
        self._stream = stream
        return stream

    def begin_later(self, beginning: asyncio.Task[_ClientStream]) -> None:
        """Let a task begin the call."""
        self._beginning = beginning

    async def read(self) -> Any:
        stream = self._stream or await self._begun()
        data = await stream.message()
        if data is not None:
            try:
                return self._answer.FromString(data)
            except DecodeError:
                stream.abandon(GrpcStatus.INTERNAL, "")
                name = self._answer.DESCRIPTOR.full_name
                raise RpcFailure(
                    GrpcStatus.INTERNAL, f"the server sent something other than a {name} message"
                ) from None
        if stream.outcome is not None and stream.outcome.status:
            raise stream.outcome
        return None

    async def write(self, message: Message) -> None:
        stream = self._stream or await self._begun()
        if stream.full:
            try:
                await stream.writable()
            except StreamEnded:
                raise CallEnded from None
        if stream.closed or stream.outcome is not None:
            raise CallEnded
        stream.send_data(prefixed(message.SerializeToString()))

    async def done_writing(self) -> None:
        stream = self._stream or await self._begun()
        if stream.outcome is None:
            stream.complete = True
            stream.finish()

    async def trailing_metadata(self) -> Mapping[str, str]:
        stream = self._stream or await self._begun()
        while stream.outcome is None:
            await stream.message()
        return stream.outcome.metadata

    async def aclose(self) -> None:
        if self._stream is not None:
            self._stream.abandon(GrpcStatus.CANCELLED, "the call was cancelled")
        elif self._beginning is not None:
            self._beginning.cancel()

    async def _begun(self) -> _ClientStream:
        if self._beginning is None:
            raise RpcFailure(GrpcStatus.CANCELLED, "the call was cancelled")
        try:
            return await asyncio.shield(self._beginning)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._beginning.cancelled() and not (task and task.cancelling()):
                raise RpcFailure(GrpcStatus.CANCELLED, "the call was cancelled") from None
            raise


class NativeChannel:
    """A channel to `unix:/path` or `host:port`, over TLS with a context that accepts only the right server."""

    def __init__(self, address: str, tls: ssl.SSLContext | None = None, server_name: str = "localhost") -> None:
        self._address = address
        self._tls = tls
        self._server_name = server_name
        self._connection: Connection | None = None
        self._connections: set[Connection] = set()  # one that goes away may still carry calls
        self._connecting: asyncio.Task[Connection] | None = None
        self._beginning: set[asyncio.Task[_ClientStream]] = set()
        self._heads: dict[MethodDescriptor, tuple[list[tuple[bytes, bytes]], type[Message]]] = {}
        self._closed = False

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._connection.going_away

    def begin(self, rpc: MethodDescriptor, *request: Message, timeout: float | None) -> _NativeCall:
        known = self._heads.get(rpc)
        if known is None:
            known = self._heads[rpc] = self._head(rpc), GetMessageClass(rpc.output_type)
        headers, answer = known
        call = _NativeCall(answer)
        data = prefixed(request[0].SerializeToString()) if request else None
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        if timeout is not None:
            headers = [*headers, (b"grpc-timeout", write_timeout(timeout))]
        if self._connection is not None and not self._connection.going_away:
            call.begin(self._connection, headers, data, deadline)
        else:
            task = asyncio.create_task(self._begin(call, headers, data, deadline))
            self._beginning.add(task)
            task.add_done_callback(self._begun)
            call.begin_later(task)
        return call

    async def close(self) -> None:
        self._closed = True
        tasks = [*self._beginning, *([self._connecting] if self._connecting is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in tuple(self._connections):
            connection.abort()
            await connection.ended

    def _head(self, rpc: MethodDescriptor) -> list[tuple[bytes, bytes]]:
        return [
            (b":method", b"POST"),
            (b":scheme", b"https" if self._tls else b"http"),
            (b":path", f"/{rpc.containing_service.full_name}/{rpc.name}".encode()),
            (b":authority", self._server_name.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"grpc-accept-encoding", b"identity,gzip"),
        ]

    def _begun(self, task: asyncio.Task[_ClientStream]) -> None:
        self._beginning.discard(task)
        if not task.cancelled():
            task.exception()  # the call raises it

    async def _begin(
        self, call: _NativeCall, headers: list[tuple[bytes, bytes]], data: bytes | None, deadline: float | None
    ) -> _ClientStream:
        try:
            async with asyncio.timeout_at(deadline):
                connection = await self._connected()
        except TimeoutError:
            raise RpcFailure(GrpcStatus.DEADLINE_EXCEEDED, _LATE) from None
        return call.begin(connection, headers, data, deadline)

    async def _connected(self) -> Connection:
        """The connection, which calls that begin at the same time share. Raises RpcFailure."""
        if self._connection is not None and not self._connection.going_away:
            return self._connection
        if self._closed:
            raise RpcFailure(GrpcStatus.CANCELLED, "the channel is closed")
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(self._connected_or_not)
        return await asyncio.shield(self._connecting)

    def _connected_or_not(self, connecting: asyncio.Task[Connection]) -> None:
        self._connecting = None
        if not connecting.cancelled():
            connecting.exception()  # raised in the calls that wait, if any does

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        path = unix_path(self._address)
        name = self._server_name if self._tls else None

        def made() -> Connection:
            return Connection(ngh2.Role.CLIENT, lost=self._connections.discard)

        try:
            if path is not None:
                _, connection = await loop.create_unix_connection(made, path, ssl=self._tls, server_hostname=name)
            else:
                host, port = host_of(self._address), int(self._address.rpartition(":")[2])
                _, connection = await loop.create_connection(made, host, port, ssl=self._tls, server_hostname=name)
        except OSError as error:
            raise RpcFailure(GrpcStatus.UNAVAILABLE, f"cannot connect: {error}") from error
        self._connection = connection
        self._connections.add(connection)
        return connection


def client_context(identity: Identity, trusted: bytes) -> ssl.SSLContext:
    """TLS as `identity`, to the holder of the trusted certificate (PEM) alone. Raises OSError."""
    import ssl

    from engine_plugin.system.certificates import pem_to_ders, tls_context

    with TemporaryDirectory(prefix="engine-plugin-") as directory:
        ders = pem_to_ders(trusted.decode())
        return tls_context(ssl.PROTOCOL_TLS_CLIENT, identity, ders, Path(directory))
