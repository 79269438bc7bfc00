"""A channel to a plugin: the rpcs of ProviderService by name, and gRPC's failures as our errors."""

from __future__ import annotations

import asyncio
from contextlib import suppress
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

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from google.protobuf.descriptor import MethodDescriptor
    from google.protobuf.message import Message

    from engine_plugin.host.process import PluginProcess

__all__ = ["CHANNEL_OPTIONS", "SERVICE", "Link", "raise_for_code", "sendable"]

SERVICE = provider_pb2.DESCRIPTOR.services_by_name["ProviderService"]

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A plugin is on this machine; a proxy that is set for the internet must not be asked for it.
    ("grpc.enable_http_proxy", 0),
    # A plugin that restarts at the same address is a new one: share no connection between channels.
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
# A lost connection is known at once, the exit behind it a moment later.
_EXIT_FOLLOWS = 2.0
# The end of a call comes right after the message that says why it failed.
_END_FOLLOWS = 2.0


def raise_for_code(response: Any) -> None:
    """Raise the error that a message of a stream with a map `metadata` stands for, if it stands for one."""
    if not is_success(response.code):
        raise error_of(response, response.metadata)


def sendable(message: Message) -> Message:
    """The message, which a plugin takes. Raises InvalidRequestError for one that is too long."""
    size = message.ByteSize()
    if size > MOST_MESSAGE:
        raise InvalidRequestError(
            f"{message.DESCRIPTOR.name}: has {size} bytes; a plugin takes messages of at most {MOST_BYTES >> 20} MiB"
        )
    return message


class Link:
    """One channel, and the process behind it when we own it. Closed by its PluginClient."""

    def __init__(self, name: str, address: str, channel: grpc.aio.Channel, process: PluginProcess | None) -> None:
        self.name = name
        self.address = address
        self.channel = channel
        self.process = process
        self.closed = False
        self._rpcs = {rpc.name: _callable(channel, rpc) for rpc in SERVICE.methods}

    def open(self, rpc: str, *request: Message, timeout: float | None) -> Any:
        """Begin a call and return grpc.aio's object for it. Raises PluginProcessError when it cannot begin."""
        if self.closed:
            raise self._stopped()
        return self._rpcs[rpc](*map(sendable, request), timeout=timeout)

    async def unary(self, rpc: str, request: Message, timeout: float | None) -> Any:
        """Make a unary call and return its response, whose `code`, if it has one, means success."""
        call = self.open(rpc, request, timeout=timeout)
        response = await self.attempt(call)
        if "code" in response.DESCRIPTOR.fields_by_name:
            await self.check(response, call)
        return response

    async def check(self, response: Any, call: Any) -> None:
        """Raise the error that the last message of a call stands for, if it stands for one."""
        if is_success(response.code):
            return
        metadata: Mapping[str, str] = {}
        with suppress(TimeoutError, EnginePluginError):  # the message alone says enough
            async with asyncio.timeout(_END_FOLLOWS):
                metadata = _texts(await self.attempt(call.trailing_metadata()))
        raise error_of(response, metadata)

    async def attempt(self, step: Awaitable[T]) -> T:
        """Await a step of a call; what gRPC raises comes out as an EnginePluginError."""
        try:
            return await step
        except grpc.aio.AioRpcError as error:
            raise await self._translate(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.closed and not (task and task.cancelling()):
                # Closing a channel cancels its calls, which their tasks must not mistake for their own end.
                raise self._stopped() from None
            raise

    async def _translate(self, error: grpc.aio.AioRpcError) -> EnginePluginError:
        process = self.process
        # The channel's state may lag behind the call that has lost its connection.
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
        """Whether an error says only that we wrote to a call which the plugin had ended.

        gRPC tells of it in the place of the call's own end, to who reads as well as to who writes.
        """
        cause = error.__cause__
        return (
            type(error) is EnginePluginError  # the plugin has not died
            and isinstance(cause, grpc.aio.AioRpcError)
            and cause.code() is grpc.StatusCode.INTERNAL
            and (cause.debug_error_string() or "").startswith(_TOO_LATE)
            and self.channel.get_state() is grpc.ChannelConnectivity.READY
        )

    def _stopped(self) -> PluginProcessError:
        return PluginProcessError(f"plugin {self.name!r} has been stopped by this host; launch it again")


def _texts(metadata: Any) -> dict[str, str]:
    """gRPC's metadata without what is not text; of a key that comes twice, the last value."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}


def _callable(channel: grpc.aio.Channel, rpc: MethodDescriptor) -> Any:
    make: Callable[..., Any] = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, True): channel.stream_stream,
    }[rpc.client_streaming, rpc.server_streaming]
    return make(
        f"/{SERVICE.full_name}/{rpc.name}",
        request_serializer=GetMessageClass(rpc.input_type).SerializeToString,
        response_deserializer=GetMessageClass(rpc.output_type).FromString,
    )
