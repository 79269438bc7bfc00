"""A channel to a plugin: calls rpcs of ProviderService by name, and raises their failures as EnginePluginError."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message_factory import GetMessageClass

from engine_plugin.errors import (
    AuthError,
    BadGatewayError,
    DeadlineError,
    EnginePluginError,
    InvalidRequestError,
    NotFoundError,
    PluginProcessError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.host.failures import error_of, identified, is_success
from engine_plugin.host.seam import RpcFailure
from engine_plugin.jsontext import MOST_BYTES, MOST_MESSAGE
from engine_plugin.protocol.stubs import provider_pb2
from engine_plugin.rpc.status import GrpcStatus
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from google.protobuf.descriptor import MethodDescriptor
    from google.protobuf.message import Message

    from engine_plugin.host.process import PluginProcess
    from engine_plugin.host.seam import Call, Channel

__all__ = ["SERVICE", "Link", "sendable"]

SERVICE = provider_pb2.DESCRIPTOR.services_by_name["ProviderService"]

T = TypeVar("T")

_ERRORS: dict[int, type[EnginePluginError]] = {
    GrpcStatus.CANCELLED: UnavailableError,
    GrpcStatus.INVALID_ARGUMENT: InvalidRequestError,
    GrpcStatus.DEADLINE_EXCEEDED: DeadlineError,
    GrpcStatus.NOT_FOUND: NotFoundError,
    GrpcStatus.PERMISSION_DENIED: AuthError,
    GrpcStatus.RESOURCE_EXHAUSTED: UnavailableError,
    GrpcStatus.FAILED_PRECONDITION: PreconditionError,
    GrpcStatus.ABORTED: BadGatewayError,
    GrpcStatus.UNIMPLEMENTED: UnsupportedError,
    GrpcStatus.UNAVAILABLE: UnavailableError,
    GrpcStatus.DATA_LOSS: BadGatewayError,
    GrpcStatus.UNAUTHENTICATED: AuthError,
}
# A lost connection is noticed at once, the exit that caused it a moment later.
_EXIT_FOLLOWS = 2.0
# The call ends right after the message with the error.
_END_FOLLOWS = 2.0


def sendable(message: Message) -> Message:
    """Return the message. Raises InvalidRequestError if it is too long for a plugin."""
    size = message.ByteSize()
    if size > MOST_MESSAGE:
        raise InvalidRequestError(
            f"{message.DESCRIPTOR.name}: {size} bytes exceed the limit of {byte_size(MOST_BYTES)}"
        )
    return message


@dataclass(eq=False)
class Link:
    """A channel, and the process of a launched plugin. Closed by its PluginClient."""

    name: str
    address: str
    channel: Channel
    process: PluginProcess | None
    closed: bool = False

    def open(self, rpc: str, *request: Message, timeout: float | None) -> Call:
        """Begin a call. Raises PluginProcessError if the link is closed."""
        return self.begin(SERVICE.methods_by_name[rpc], *request, timeout=timeout)

    def begin(self, rpc: MethodDescriptor, *request: Message, timeout: float | None = None) -> Call:
        """Begin a call of any service. Raises PluginProcessError if the link is closed."""
        if self.closed:
            raise self._stopped()
        return self.channel.begin(rpc, *map(sendable, request), timeout=timeout)

    async def unary(self, rpc: str, timeout: float | None, **fields: Any) -> Any:
        """Make a unary call with the fields of its request, and return its response.

        Raises the error of the response's `code`, if it has one.
        """
        method = SERVICE.methods_by_name[rpc]
        call = self.begin(method, GetMessageClass(method.input_type)(**fields), timeout=timeout)
        response = await self.answer(call)
        if "code" in response.DESCRIPTOR.fields_by_name:
            await self.check(response, call)
        return response

    async def answer(self, call: Call) -> Any:
        """The response of a unary call."""
        try:
            response = await self.attempt(call.read())
        except BaseException:
            await call.aclose()
            raise
        if response is None:
            raise BadGatewayError(f"plugin {self.name!r} ended the call without an answer")
        return response

    async def check(self, response: Any, call: Call) -> None:
        """Raise the error of a call's message, if its code is an error.

        The error's metadata is in the message, or at the end of a call whose messages have none.
        """
        if is_success(response.code):
            return
        metadata: Mapping[str, str] = {}
        if "metadata" in response.DESCRIPTOR.fields_by_name:
            metadata = response.metadata
        else:
            with suppress(TimeoutError, EnginePluginError):  # without metadata, the message and its code suffice
                async with asyncio.timeout(_END_FOLLOWS):
                    metadata = await self.attempt(call.trailing_metadata())
        raise error_of(response.code, response.message, metadata)

    async def attempt(self, step: Awaitable[T]) -> T:
        """Await a step of a call. Its failure is raised as EnginePluginError."""
        try:
            return await step
        except RpcFailure as failure:
            if self.closed:
                raise self._stopped() from None
            raise await self._translate(failure) from failure

    async def _translate(self, failure: RpcFailure) -> EnginePluginError:
        process = self.process
        # The state of the channel can change later than the call fails.
        if process is not None and (failure.status == GrpcStatus.UNAVAILABLE or not self.channel.connected):
            await process.wait(_EXIT_FOLLOWS)
        if process is not None and process.returncode is not None:
            return PluginProcessError(process.describe("during the call"))
        details = failure.details or f"gRPC status {failure.status}"
        if failure.status == GrpcStatus.DEADLINE_EXCEEDED:
            details = f"plugin {self.name!r} did not answer in time: {details}"
        elif failure.status == GrpcStatus.UNAVAILABLE and process is None:
            details = f"nothing answers at {self.address}: {details}"
        return identified(_ERRORS.get(failure.status, EnginePluginError)(details), failure.metadata)

    def _stopped(self) -> PluginProcessError:
        return PluginProcessError(f"plugin {self.name!r} was stopped by this host. Launch it again")
