"""The interface between rpc handlers and the gRPC server that runs them.

A handler knows protobuf messages and a `Call`, never grpcio. `server.grpc_aio` runs handlers on grpc.aio; another
server can replace it by implementing `RpcServer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from typing import Any

    from google.protobuf.descriptor import ServiceDescriptor
    from google.protobuf.message import Message

    from engine_plugin.errors import EnginePluginError
    from engine_plugin.rpc.status import GrpcStatus

__all__ = ["Call", "HostGone", "HostedPlugin", "RpcError", "RpcServer", "RpcService"]


class RpcError(Exception):
    """Raised by a handler to end its call with a gRPC status instead of a message with a code."""

    def __init__(self, status: GrpcStatus, details: str, metadata: Mapping[str, str] | None = None) -> None:
        """`metadata` is sent with the status, as trailing metadata."""
        super().__init__(details)
        self.status = status
        self.details = details
        self.metadata = metadata or {}

    @classmethod
    def of(cls, status: GrpcStatus, error: EnginePluginError) -> RpcError:
        """The status for a call that failed with this error."""
        return cls(status, error.message, error.metadata)


class HostGone(Exception):  # noqa: N818  # nothing is wrong
    """The client has left; the task of the call is about to be cancelled. Handlers do not catch it."""


class Call(Protocol):
    """One call as its handler sees it. When the host cancels the call, the handler's task is cancelled."""

    def end_with(self, metadata: Mapping[str, str]) -> None:
        """Send this trailing metadata when the call ends."""

    async def send(self, message: Message) -> None:
        """Send one message of a streamed answer. Returns when the transport has room for the next.

        Raises HostGone.
        """

    async def receive(self) -> Message | None:
        """The next message of a streamed request; None after the host's half-close. Raises HostGone."""


class RpcService(NamedTuple):
    """A gRPC service and the object that answers it, which has a method for each rpc.

    Unary requests go to `method(request, call)`, streamed ones to `method(call)`. A unary answer is the method's
    return value; a streamed one is sent by `call.send`.
    """

    descriptor: ServiceDescriptor
    servicer: object


class HostedPlugin(NamedTuple):
    """A plugin that is ready to be served: its gRPC services, and how to close it.

    The services are read once, before the handshake, and served beside go-plugin's. `aclose` stops the engine and
    releases everything; under a host it is cancelled after 1.2 s, when the process exits.
    """

    services: Sequence[RpcService]
    aclose: Callable[[], Coroutine[Any, Any, None]]


class RpcServer(Protocol):
    """A gRPC server, created, started and stopped by one owner. It answers health and reflection itself."""

    def add(self, service: RpcService) -> None:
        """Add `service`. Called before `start`. Raises AttributeError when its servicer lacks a method."""

    async def start(self, address: str) -> str:
        """Listen on `unix:/path` or `host:port` (port 0: any free port) and return the bound address.

        Raises OSError when the address cannot be bound.
        """

    async def stop(self, grace: float) -> None:
        """Refuse new calls, give running calls `grace` seconds, then cancel them."""
