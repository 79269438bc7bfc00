"""The interface between the host's calls and the gRPC channel that carries them.

A channel goes to one address. It connects at the first call, and again at the next one after its connection was lost.
`host.grpc_aio` has channels of grpc.aio, `host.native` those of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.descriptor import MethodDescriptor
    from google.protobuf.message import Message


__all__ = ["Call", "CallEnded", "Channel", "RpcFailure"]


class RpcFailure(Exception):  # noqa: N818  # of the call, not of this program
    """A call ended with a gRPC status (its number) other than OK, which may have text metadata."""

    def __init__(self, status: int, details: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(details)
        self.status = status
        self.details = details
        self.metadata = metadata or {}


class CallEnded(Exception):  # noqa: N818  # the plugin may end a call at any time
    """A message cannot be sent: the call has ended. `read` tells how."""


class Call(Protocol):
    """One call of any kind. One task reads, one writes; its owner closes it unless it has read to the end."""

    async def read(self) -> Any:
        """The next message; None at the end of a call with status OK. Raises RpcFailure."""

    async def write(self, message: Message) -> None:
        """Send a message of a streamed request; waits while the plugin reads slowly. Raises CallEnded."""

    async def done_writing(self) -> None:
        """End a streamed request; answers may still arrive."""

    async def trailing_metadata(self) -> Mapping[str, str]:
        """The text metadata at the end of the call, which is waited for."""

    async def aclose(self) -> None:
        """End the call, and the plugin's work on it. A pending `read` raises RpcFailure. Idempotent."""


class Channel(Protocol):
    """The calls to one plugin. Closed by its Link."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection at this moment."""

    def begin(self, rpc: MethodDescriptor, *request: Message, timeout: float | None) -> Call:
        """Begin a call with its request, which a streamed one writes later. Returns at once."""

    async def close(self) -> None:
        """End all calls and the connection."""
