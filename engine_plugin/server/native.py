"""`RpcServer` on HTTP/2 connections of this package, with gRPC's health and reflection services."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import ngh2
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from engine_plugin.errors import InvalidRequestError
from engine_plugin.jsontext import MOST_MESSAGE
from engine_plugin.rpc.http2 import Connection, Stream, StreamEnded
from engine_plugin.rpc.status import GrpcStatus
from engine_plugin.rpc.wire import ENCODINGS, MessageReader, WireError, parse_timeout, prefixed, trailers
from engine_plugin.server.health import health
from engine_plugin.server.seam import HostGone, RpcError, RpcServer
from engine_plugin.system.addresses import host_of, is_loopback, unix_path

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Mapping

    from google.protobuf.message import Message

    from engine_plugin.rpc.http2 import Headers
    from engine_plugin.server.peers import LocalPeers
    from engine_plugin.server.seam import RpcService

__all__ = ["NativeServer"]

_log = logging.getLogger(__name__)

_HEAD = ((b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-accept-encoding", b"identity,gzip"))
_OK = ((b"grpc-status", b"0"),)
_NO_ERROR = 0  # HTTP/2's code for "stop sending, the answer is complete"
_LEAVE_TAKING = 5.0  # seconds for a client that still sends to read the status and end the call
_MOST_LARGE = 1 << 30  # bytes of requests longer than their windows, of all calls under way
_TOO_MUCH = "the long requests under way hold 1 GiB, the most that the plugin takes at a time: send it after they end"
_WAITING_CONNECTIONS = 1024
_LAST_BYTES = 0.3  # seconds for clients to read the last bytes and close


class _Method(NamedTuple):
    """An rpc and what answers it."""

    handler: Callable[..., Awaitable[Any]]
    request: type[Message]
    streams_request: bool
    streams_response: bool


class _ServerCall(Stream):
    """One call: a stream for its connection, a `Call` for its handler.

    The handler runs in a task, which is cancelled when the client leaves or the deadline passes.
    """

    __slots__ = (
        "_answered",
        "_arrival",
        "_ended",
        "_headed",
        "_large",
        "_method",
        "_reader",
        "_server",
        "_task",
        "_timer",
        "_trailing",
    )

    def __init__(
        self,
        connection: Connection,
        number: int,
        method: _Method,
        server: NativeServer,
    ) -> None:
        super().__init__(connection, number)
        self._method = method
        self._server = server
        self._large = 0  # bytes beyond the window that it counts among the server's
        self._headed = False  # the head of the response is sent
        self._answered = False  # its status is sent
        self._ended = False  # the request is complete
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._arrival: asyncio.Future[None] | None = None
        self._trailing: Mapping[str, str] = {}
        self._reader = MessageReader(MOST_MESSAGE)

    # Call

    def end_with(self, metadata: Mapping[str, str]) -> None:
        self._trailing = metadata

    async def send(self, message: Message) -> None:
        if self.closed:
            raise HostGone
        self._put(message)
        if self.full:
            try:
                await self.writable()
            except StreamEnded:
                raise HostGone from None

    async def receive(self) -> Message | None:
        while not self._reader.messages:
            if self.closed:
                raise HostGone
            if self._ended:
                return None
            self._arrival = self.connection.loop.create_future()
            await self._arrival
        return self._take()

    # Stream

    def on_headers(self, headers: Headers, *, ended: bool) -> None:
        for name, value in headers:
            if name == b"grpc-timeout" and (seconds := parse_timeout(value)) is not None:
                self._timer = self.connection.loop.call_later(seconds, self._late)
            elif name == b"grpc-encoding":
                self._reader.unzips = value == b"gzip"
        self._ended = ended
        if self._method.streams_request or ended:
            self._begin()

    def on_data(self, data: bytes, *, ended: bool) -> None:
        self._ended = ended
        if self._answered:
            self.consumed()
            return
        try:
            self._reader.feed(data)
        except WireError as error:
            self._reject(error.status, error.details)
            return
        if not self._reader.messages and not ended:
            self._grow(len(data))
        self._wake()
        if ended and self._task is None:
            self._begin()

    def _grow(self, size: int) -> None:
        """Let a message become longer than the window, as long as the server does not hold too much."""
        self._large += size
        self._server.large += size
        self.consumed()
        if self._server.large > _MOST_LARGE:
            self._reject(GrpcStatus.RESOURCE_EXHAUSTED, _TOO_MUCH)

    def _reject(self, status: GrpcStatus, details: str) -> None:
        """End the call for its request, of which nothing more is kept."""
        self._cancel()
        self._end(status, details, {})
        self._reader = MessageReader(MOST_MESSAGE)
        self._shrink()

    def _shrink(self) -> None:
        self._server.large -= self._large
        self._large = 0

    def on_trailers(self, headers: Headers) -> None:  # noqa: ARG002  # gRPC's clients send none
        self.on_data(b"", ended=True)

    def on_closed(self, code: int | None) -> None:  # noqa: ARG002  # whatever ended it, the client has left
        if self._timer is not None:
            self._timer.cancel()
        self._shrink()
        self._wake()
        self._cancel()

    def _begin(self) -> None:
        self._task = self._server.run(self)

    async def answer(self) -> None:
        """Let the handler answer, and end the call."""
        method = self._method
        try:
            if method.streams_request:
                answer = await method.handler(self)
            else:
                answer = await method.handler(self._only_message(), self)
            if not method.streams_response:
                self._put(answer, more=True)
        except HostGone:
            return
        except asyncio.CancelledError:  # the server stops, or something within the handler was cancelled
            self._end(GrpcStatus.UNAVAILABLE, "the plugin cancelled the call", {})
            raise
        except RpcError as error:
            self._end(error.status, error.details, error.metadata)
        except Exception as error:  # noqa: BLE001  # the edge: the client gets a status, and the log the traceback
            _log.error("a call failed", exc_info=error)
            self._end(GrpcStatus.UNKNOWN, f"{type(error).__name__}: {error}", {})
        else:
            self._end(GrpcStatus.OK, "", self._trailing)

    def refuse(self) -> None:
        """End the call of another user."""
        from engine_plugin.server.peers import REFUSED

        self._end(GrpcStatus.PERMISSION_DENIED, REFUSED.message, REFUSED.metadata)

    def _only_message(self) -> Message:
        if len(self._reader.messages) != 1 or self._reader.incomplete:
            raise RpcError(GrpcStatus.INVALID_ARGUMENT, "this rpc takes one message")
        return self._take()

    def _take(self) -> Message:
        try:
            data, size = self._reader.take()
        except WireError as broken:
            raise RpcError(broken.status, broken.details) from None
        self.consumed(size if self._reader.messages else None)
        if self._method.streams_request:
            self._shrink()
        kind = self._method.request
        try:
            return kind.FromString(data)
        except DecodeError:
            error = InvalidRequestError(f"not a valid {kind.DESCRIPTOR.full_name} message")
            raise RpcError.of(GrpcStatus.INVALID_ARGUMENT, error) from None

    def _put(self, message: Message, *, more: bool = False) -> None:
        if self._answered:
            return
        if not self._headed:
            self._headed = True
            self.send_headers(_HEAD)
        self.send_data(prefixed(message.SerializeToString()), more=more)

    def _end(self, status: GrpcStatus, details: str, metadata: Mapping[str, str]) -> None:
        """End the call, once."""
        if self._answered or self.closed:
            return
        self._answered = True
        if self._timer is not None:
            self._timer.cancel()
        fields = trailers(status, details, metadata) if status or metadata else _OK
        if self._headed:
            self.send_trailers(fields)
        else:
            self.send_headers((*_HEAD, *fields), end=True)
        if not self._ended:  # a reset at once would overtake the status
            self._timer = self.connection.loop.call_later(_LEAVE_TAKING, self.reset, _NO_ERROR)

    def _late(self) -> None:
        self._cancel()
        self._end(GrpcStatus.DEADLINE_EXCEEDED, "the deadline of the call has passed", {})

    def _cancel(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)


class NativeServer(RpcServer):
    """A gRPC server. `health_service` is the name that health checks report SERVING (go-plugin: `plugin`)."""

    def __init__(self, health_service: str = "plugin") -> None:
        self._health_service = health_service
        self._names: list[str] = []
        self._reflects = False
        self._methods: dict[bytes, _Method] = {}
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._admissions: dict[Connection, asyncio.Task[bool]] = {}
        self.large = 0
        """Bytes of long requests that its calls hold."""
        self._peers: LocalPeers | None = None
        self._listener: asyncio.Server | None = None
        self._stopping = False

    def add(self, service: RpcService) -> None:
        descriptor, servicer = service
        for rpc in descriptor.methods:
            self._methods[f"/{descriptor.full_name}/{rpc.name}".encode()] = _Method(
                getattr(servicer, rpc.name),
                GetMessageClass(rpc.input_type),
                rpc.client_streaming,
                rpc.server_streaming,
            )
        self._names.append(descriptor.full_name)

    async def start(self, address: str) -> str:
        loop = asyncio.get_running_loop()
        path = unix_path(address)
        if path is not None:
            self._listener = await loop.create_unix_server(self.connection, path, backlog=_WAITING_CONNECTIONS)
            bound = address
        else:
            host, _, port = address.rpartition(":")
            self._listener = await loop.create_server(
                self.connection, host_of(address), int(port), backlog=_WAITING_CONNECTIONS, reuse_port=False
            )
            number: int = self._listener.sockets[0].getsockname()[1]
            bound = f"{host}:{number}"
            if is_loopback(address):
                from engine_plugin.server.peers import LocalPeers

                self._peers = LocalPeers(number)
                await self._peers.prepare(host_of(address))
        self.open()
        return bound

    async def adopt(self, listener: socket.socket) -> None:
        """Listen on a unix socket that listens already; as `start`. The socket is closed by `stop`."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_unix_server(self.connection, sock=listener, backlog=_WAITING_CONNECTIONS)
        self.open()

    def open(self) -> None:
        """Answer calls on connections made by `connection`, for an owner that listens itself."""
        self.add(health(self._health_service))

    async def stop(self, grace: float) -> None:
        self._stopping = True
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self._connections):
            connection.go_away()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        connections = tuple(self._connections)
        for connection in connections:
            connection.close()
        if connections:
            _, late = await asyncio.wait({connection.ended for connection in connections}, timeout=_LAST_BYTES)
            for connection in connections:
                connection.abort()
            if late:
                await asyncio.wait(late)

    def connection(self) -> Connection:
        """The protocol of a new connection."""
        connection = Connection(ngh2.Role.SERVER, accept=self._accept, lost=self._lost)
        self._connections.add(connection)
        if self._stopping:  # it was accepted just before
            connection.abort()
        return connection

    def _lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._admissions.pop(connection, None)

    def _accept(self, connection: Connection, number: int, headers: Headers) -> Stream | None:
        fields = dict(headers)
        if fields.get(b":method") != b"POST" or not fields.get(b"content-type", b"").startswith(b"application/grpc"):
            status = b"415" if fields.get(b":method") == b"POST" else b"405"
            head = ((b":status", status), (b"content-type", b"text/plain"))
            connection.refuse(number, head, b"This server speaks gRPC.\n")
            return None
        path, encoding = fields.get(b":path", b""), fields.get(b"grpc-encoding", b"identity")
        method = self._methods.get(path) or self._reflection_method(path)
        if method is not None and encoding in ENCODINGS:
            return _ServerCall(connection, number, method, self)
        what = f"method {path.decode('ascii', 'replace')}"
        if method is not None:
            what = f"compression {encoding.decode('ascii', 'replace')}; use gzip or none"
        connection.refuse(number, (*_HEAD, *trailers(GrpcStatus.UNIMPLEMENTED, f"no {what}", {})))
        return None

    def _reflection_method(self, path: bytes) -> _Method | None:
        """The method of the reflection service, which is loaded at the first call."""
        if self._reflects or not path.startswith(b"/grpc.reflection."):
            return None
        from engine_plugin.server.reflection import reflection

        self._reflects = True
        for service in reflection(self._names):
            self.add(service)
        return self._methods.get(path)

    def run(self, call: _ServerCall) -> asyncio.Task[None]:
        """Answer a call in a task."""
        answer = call.answer() if self._peers is None else self._admitted(call, self._peers)
        task = asyncio.get_running_loop().create_task(answer)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _admitted(self, call: _ServerCall, peers: LocalPeers) -> None:
        """Answer the call if this user owns the other end of its connection, which is looked up once."""
        connection = call.connection
        looking = self._admissions.get(connection)
        if looking is None:
            peer = connection.transport.get_extra_info("peername")
            looking = self._admissions[connection] = asyncio.create_task(peers.admits(_grpc_peer(peer)))
        if await asyncio.shield(looking):
            await call.answer()
        else:
            call.refuse()


def _grpc_peer(name: tuple[Any, ...]) -> str:
    """A socket's address as gRPC writes a peer."""
    host, port = name[:2]
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
