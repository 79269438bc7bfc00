"""Channels of grpc.aio."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from engine_plugin.host.seam import CallEnded, RpcFailure
from engine_plugin.rpc.status import GrpcStatus
from engine_plugin.system.addresses import grpc_target, unix_path

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from google.protobuf.descriptor import MethodDescriptor
    from google.protobuf.message import Message

    from engine_plugin.system.certificates import Identity

__all__ = ["AioChannel"]

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A plugin runs on this machine: never use a proxy.
    ("grpc.enable_http_proxy", 0),
    # A plugin restarted at the same address is another plugin: channels must not share connections.
    ("grpc.use_local_subchannel_pool", 1),
)
_TOO_LATE = 'Failed "execute_batch": (<grpc._cython.cygrpc.Send'


class AioChannel:
    """A channel to `unix:/path` or `host:port`; with an identity over TLS, to the holder of a certificate (PEM)."""

    def __init__(self, address: str, identity: Identity | None = None, trusted: bytes = b"") -> None:
        self._channel = _open(address, identity, trusted)
        self._rpcs: dict[MethodDescriptor, Any] = {}

    @property
    def connected(self) -> bool:
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    def begin(self, rpc: MethodDescriptor, *request: Message, timeout: float | None) -> _AioCall:
        make = self._rpcs.get(rpc)
        if make is None:
            make = self._rpcs[rpc] = _callable(self._channel, rpc)
        return _AioCall(self, make(*request, timeout=timeout), streams=rpc.server_streaming)

    async def close(self) -> None:
        await self._channel.close()


class _AioCall:
    def __init__(self, channel: AioChannel, call: Any, *, streams: bool) -> None:
        self._channel = channel
        self._call = call
        self._streams = streams
        self._messages: Any = None
        self._answered = False

    async def read(self) -> Any:
        if not self._streams:
            if self._answered:
                return None
            message = await self._attempt(self._call)
            self._answered = True
            return message
        # Not `read`: after a late write it drops messages that the plugin had sent before.
        if self._messages is None:
            self._messages = aiter(self._call)
        try:
            message = await self._attempt(anext(self._messages, grpc.aio.EOF))
        except CallEnded:
            return None
        return None if message is grpc.aio.EOF else message

    async def write(self, message: Message) -> None:
        try:
            await self._attempt(self._call.write(message))
        except asyncio.InvalidStateError:
            raise CallEnded from None

    async def done_writing(self) -> None:
        await self._attempt(self._call.done_writing())

    async def trailing_metadata(self) -> Mapping[str, str]:
        return _texts(await self._attempt(self._call.trailing_metadata()))

    async def aclose(self) -> None:
        self._call.cancel()
        if self._messages is not None and not self._messages.ag_running:
            # Iterator and call reference each other and the connection, even of a closed client.
            await self._messages.aclose()

    async def _attempt(self, step: Awaitable[Any]) -> Any:
        try:
            return await step
        except grpc.aio.AioRpcError as error:
            if self._was_late(error):
                raise CallEnded from error
            details = error.details() or error.code().name
            raise RpcFailure(error.code().value[0], details, _texts(error.trailing_metadata())) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._call.cancelled() and not (task and task.cancelling()):
                raise RpcFailure(GrpcStatus.CANCELLED, "the call was cancelled") from None  # not this task
            raise

    def _was_late(self, error: grpc.aio.AioRpcError) -> bool:
        """Whether the error only means that this side wrote to a call that the plugin had ended.

        gRPC raises it for readers and writers, in place of the status of the call.
        """
        return (
            error.code() is grpc.StatusCode.INTERNAL
            and (error.debug_error_string() or "").startswith(_TOO_LATE)
            and self._channel.connected
        )


def _texts(metadata: Any) -> dict[str, str]:
    """The text values of gRPC metadata; of repeated keys the last value."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}


def _callable(channel: grpc.aio.Channel, rpc: MethodDescriptor) -> Any:
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


def _open(address: str, identity: Identity | None, trusted: bytes) -> grpc.aio.Channel:
    path = unix_path(address)
    folder: int | None = None
    if path is not None and "," in path and sys.platform == "linux":
        # gRPC splits the path at commas, even escaped ones; so the directory is named by its descriptor.
        with contextlib.suppress(OSError):  # gRPC reports the missing socket
            folder = os.open(Path(path).parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            address = f"unix:/proc/self/fd/{folder}/{Path(path).name}"
    target = grpc_target(address)
    if identity is None:
        channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
    else:
        from engine_plugin.system.certificates import NAME

        credentials = grpc.ssl_channel_credentials(trusted, identity.key_pem(), identity.certificate_pem)
        options = (*_OPTIONS, ("grpc.ssl_target_name_override", NAME))
        channel = grpc.aio.secure_channel(target, credentials, options=options)
    if folder is not None:
        weakref.finalize(channel, os.close, folder)
    return channel
