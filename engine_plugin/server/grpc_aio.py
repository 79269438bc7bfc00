"""`RpcServer` on grpc.aio."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from engine_plugin.errors import InvalidRequestError
from engine_plugin.jsontext import MOST_MESSAGE
from engine_plugin.rpc.status import GrpcStatus
from engine_plugin.rpc.wire import fitting
from engine_plugin.server.gate import Gate, method_kind
from engine_plugin.server.health import health
from engine_plugin.server.peers import LocalPeers
from engine_plugin.server.reflection import reflection
from engine_plugin.server.seam import HostGone, RpcError, RpcServer
from engine_plugin.system.addresses import grpc_target, host_of, is_loopback

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from google.protobuf.descriptor import MethodDescriptor
    from google.protobuf.message import Message

    from engine_plugin.server.seam import RpcService
    from engine_plugin.system.certificates import Identity

__all__ = ["AioServer", "method_handler"]

_NO_LIMIT = 2**31 - 1

_OPTIONS = (
    # A longer message ends its call with RESOURCE_EXHAUSTED before it is read. grpcio's default is 4 MiB.
    ("grpc.max_receive_message_length", MOST_MESSAGE),
    ("grpc.max_send_message_length", -1),
    # Else two servers could bind one TCP port without an error.
    ("grpc.so_reuseport", 0),
    # Hosts may send keepalive pings at any rate, also between calls. By default the server closes the connection on
    # the third ping within five minutes.
    ("grpc.http2.max_ping_strikes", 0),
    # Else calls that wait to be accepted are cancelled: some of more than 1,000 at random, all of more
    # than 3,000, and those that have waited for 30 s. The engine limits how many wait for a model (max_queue).
    ("grpc.server.max_pending_requests", _NO_LIMIT),
    ("grpc.server.max_pending_requests_hard_limit", _NO_LIMIT),
    ("grpc.server_max_unrequested_time_in_server", _NO_LIMIT),
)

_GONE = (grpc.aio.InternalError, grpc.aio.UsageError)
"""The texts with which grpcio refuses to send, receive or finish after the client has left."""


def _is_wrong(record: logging.LogRecord) -> bool:
    """Whether this log record of grpcio is about more than a host that left before the call's end."""
    return not (record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError))


logging.getLogger("grpc._cython.cygrpc").addFilter(_is_wrong)


def _reader(kind: type[Message]) -> Callable[[bytes], Message | RpcError]:
    """A deserializer that returns an error for what is no message: one that it raises would become UNKNOWN."""

    def read(data: bytes) -> Message | RpcError:
        try:
            return kind.FromString(data)
        except DecodeError:
            error = InvalidRequestError(f"not a valid {kind.DESCRIPTOR.full_name} message")
            return RpcError.of(GrpcStatus.INVALID_ARGUMENT, error)

    return read


class _AioCall:
    """`Call` over a grpc.aio servicer context."""

    __slots__ = ("_context",)

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context

    def end_with(self, metadata: Mapping[str, str]) -> None:
        self._context.set_trailing_metadata(tuple(metadata.items()))

    async def send(self, message: Message) -> None:
        try:
            await self._context.write(message)
        except _GONE as gone:
            raise HostGone(str(gone)) from gone

    async def receive(self) -> Message | None:
        try:
            message = await self._context.read()
        except _GONE as gone:
            raise HostGone(str(gone)) from gone
        if isinstance(message, RpcError):
            raise message
        return None if message is grpc.aio.EOF else message


def _guard(handler: Callable[..., Awaitable[Any]], takes_request: bool) -> Callable[..., Awaitable[Any]]:
    """Adapt a handler to grpc.aio's calling convention and turn RpcError into a gRPC status."""

    async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        call = _AioCall(context)
        try:
            if isinstance(request, RpcError):
                raise request
            return await (handler(request, call) if takes_request else handler(call))
        except HostGone as gone:
            raise asyncio.CancelledError from gone
        except RpcError as error:
            try:
                await context.abort(
                    grpc.StatusCode[error.status.name], fitting(error.details), tuple(error.metadata.items())
                )
            except grpc.aio.InternalError as gone:
                raise asyncio.CancelledError from gone

    return serve


def method_handler(rpc: MethodDescriptor, handler: Callable[..., Awaitable[Any]]) -> grpc.RpcMethodHandler[Any, Any]:
    """grpcio's handler for an rpc that `handler` answers."""
    kind = method_kind(rpc.client_streaming, rpc.server_streaming)
    make: Callable[..., grpc.RpcMethodHandler[Any, Any]] = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        _guard(handler, takes_request=not rpc.client_streaming),
        request_deserializer=_reader(GetMessageClass(rpc.input_type)),
        response_serializer=GetMessageClass(rpc.output_type).SerializeToString,
    )


def _mutual_tls(identity: Identity) -> grpc.ServerCredentials:
    certificate = identity.certificate_pem
    return grpc.ssl_server_credentials(
        [(identity.key_pem(), certificate)], root_certificates=certificate, require_client_auth=True
    )


class AioServer(RpcServer):
    """A grpc.aio server. `health_service` is the name that health checks report SERVING (go-plugin: `plugin`).

    With `only_for` it serves TLS as that identity, to clients with the same identity.
    """

    def __init__(self, health_service: str = "plugin", only_for: Identity | None = None) -> None:
        self._gate = Gate()
        self._server = grpc.aio.server(options=_OPTIONS, interceptors=(self._gate,))
        self._credentials = _mutual_tls(only_for) if only_for is not None else None
        self._names: list[str] = []
        self.add(health(health_service))

    def add(self, service: RpcService) -> None:
        descriptor, servicer = service
        handlers = {rpc.name: method_handler(rpc, getattr(servicer, rpc.name)) for rpc in descriptor.methods}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(descriptor.full_name, handlers),))
        self._names.append(descriptor.full_name)

    async def start(self, address: str) -> str:
        port = self._bind(address)
        for service in reflection(self._names):  # after the step that may fail: the caller may try another address
            self.add(service)
        if self._credentials is None and is_loopback(address):
            self._gate.peers = LocalPeers(port)
        await self._server.start()
        if self._gate.peers is not None:
            await self._gate.peers.prepare(host_of(address))
        if address.startswith("unix:"):
            return address
        return f"{address.rpartition(':')[0]}:{port}"

    async def stop(self, grace: float) -> None:
        await self._server.stop(grace)
        # grpcio has cancelled the calls but does not wait for their tasks. If the loop ended before them, grpcio's
        # own tasks would be cancelled and log an error.
        if self._gate.running:
            await asyncio.wait(self._gate.running, timeout=grace)

    def _bind(self, address: str) -> int:
        target = grpc_target(address)
        try:
            if self._credentials is not None:
                return self._server.add_secure_port(target, self._credentials)
            return self._server.add_insecure_port(target)
        except RuntimeError as error:  # grpcio raises this for every reason, without the errno
            raise OSError(errno.EADDRINUSE, f"cannot listen on {address}: {error}") from error
