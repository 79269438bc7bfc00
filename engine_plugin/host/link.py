"""A channel to a plugin: calls the rpcs of ProviderService by name and translates gRPC errors."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio
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
from engine_plugin.jsontext import MOST_BYTES, MOST_MESSAGE
from engine_plugin.protocol.stubs import provider_pb2
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from google.protobuf.descriptor import MethodDescriptor
    from google.protobuf.message import Message

    from engine_plugin.host.process import PluginProcess

__all__ = ["CHANNEL_OPTIONS", "SERVICE", "Link", "method", "sendable"]

SERVICE = provider_pb2.DESCRIPTOR.services_by_name["ProviderService"]

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A plugin runs on this machine: never use a proxy.
    ("grpc.enable_http_proxy", 0),
    # A plugin restarted at the same address is another plugin: channels must not share connections.
    ("grpc.use_local_subchannel_pool", 1),
)

T = TypeVar("T")

_TOO_LATE = 'Failed "execute_batch": (<grpc._cython.cygrpc.Send'

_ERRORS: dict[grpc.StatusCode, type[EnginePluginError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: AuthError,
    grpc.StatusCode.PERMISSION_DENIED: AuthError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.ABORTED: BadGatewayError,
    grpc.StatusCode.DATA_LOSS: BadGatewayError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,
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
    channel: grpc.aio.Channel
    process: PluginProcess | None
    closed: bool = False

    def __post_init__(self) -> None:
        self._rpcs = {rpc.name: method(self.channel, rpc) for rpc in SERVICE.methods}

    def open(self, rpc: str, *request: Message, timeout: float | None) -> Any:
        """Start a call and return its grpc.aio object. Raises PluginProcessError if the link is closed."""
        if self.closed:
            raise self._stopped()
        return self._rpcs[rpc](*map(sendable, request), timeout=timeout)

    async def unary(self, rpc: str, timeout: float | None, **fields: Any) -> Any:
        """Make a unary call with the fields of its request, and return its response.

        Raises the error of the response's `code`, if it has one.
        """
        call = self.open(rpc, GetMessageClass(SERVICE.methods_by_name[rpc].input_type)(**fields), timeout=timeout)
        response = await self.attempt(call)
        if "code" in response.DESCRIPTOR.fields_by_name:
            await self.check(response, call)
        return response

    async def check(self, response: Any, call: Any) -> None:
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
                    metadata = _texts(await self.attempt(call.trailing_metadata()))
        raise error_of(response.code, response.message, metadata)

    async def attempt(self, step: Awaitable[T]) -> T:
        """Await a step of a call. gRPC errors are raised as EnginePluginError."""
        try:
            return await step
        except grpc.aio.AioRpcError as error:
            raise await self._translate(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.closed and not (task and task.cancelling()):
                # Closing a channel cancels its calls: not a cancellation of this task.
                raise self._stopped() from None
            raise

    async def _translate(self, error: grpc.aio.AioRpcError) -> EnginePluginError:
        process = self.process
        # The state of the channel can change later than the call fails.
        lost = (
            error.code() is grpc.StatusCode.UNAVAILABLE
            or self.channel.get_state() is not grpc.ChannelConnectivity.READY
        )
        if process is not None and lost:
            await process.wait(_EXIT_FOLLOWS)
        if process is not None and process.returncode is not None:
            return PluginProcessError(process.describe("during the call"))
        details = error.details() or error.code().name
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            details = f"plugin {self.name!r} did not answer in time: {details}"
        elif error.code() is grpc.StatusCode.UNAVAILABLE and process is None:
            details = f"nothing answers at {self.address}: {details}"
        return identified(_ERRORS.get(error.code(), EnginePluginError)(details), _texts(error.trailing_metadata()))

    def ended_before(self, error: EnginePluginError) -> bool:
        """Return whether an error only means that this side wrote to a call that the plugin had ended.

        gRPC raises it for readers and writers, in place of the status of the call.
        """
        cause = error.__cause__
        return (
            type(error) is EnginePluginError  # not PluginProcessError: the plugin runs
            and isinstance(cause, grpc.aio.AioRpcError)
            and cause.code() is grpc.StatusCode.INTERNAL
            and (cause.debug_error_string() or "").startswith(_TOO_LATE)
            and self.channel.get_state() is grpc.ChannelConnectivity.READY
        )

    def _stopped(self) -> PluginProcessError:
        return PluginProcessError(f"plugin {self.name!r} was stopped by this host. Launch it again")


def _texts(metadata: Any) -> dict[str, str]:
    """Return the text values of gRPC metadata; of repeated keys the last value."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}


def method(channel: grpc.aio.Channel, rpc: MethodDescriptor) -> Any:
    """Return the callable of an rpc on a channel, of any service."""
    make: Callable[..., Any] = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, True): channel.stream_stream,
    }[rpc.client_streaming, rpc.server_streaming]
    return make(
        f"/{rpc.containing_service.full_name}/{rpc.name}",
        request_serializer=GetMessageClass(rpc.input_type).SerializeToString,
        response_deserializer=GetMessageClass(rpc.output_type).FromString,
    )
