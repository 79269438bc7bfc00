"""Streamed answers: a service's stream of chunks, and a conversation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from engine_plugin.errors import BadGatewayError, EnginePluginError
from engine_plugin.host.link import sendable
from engine_plugin.host.seam import CallEnded
from engine_plugin.protocol.stubs import provider_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.message import Message

    from engine_plugin.host.link import Link
    from engine_plugin.host.seam import Call as RpcCall

__all__ = ["BidiCall", "BidiMessage", "ChunkStream", "DuplexCall", "StreamedCall"]


_ENDED = "the conversation has ended. See the plugin's last message for the reason"


class StreamedCall:
    """A call with a streamed answer: started on first use, read message by message, cancelled on exit.

    A call that sends one message takes it as `request`. With `checked`, an error code of a message is raised.
    """

    def __init__(self, link: Link, rpc: str, timeout: float | None, *request: Message, checked: bool = True) -> None:
        self._link = link
        self._rpc = rpc
        self._timeout = timeout
        self._request = request
        self._checked = checked
        self._call: RpcCall | None = None
        self._over = False

    async def __aenter__(self) -> Self:
        self._started()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        return await self._read()

    async def aclose(self) -> None:
        """End the call. If it is still running, it is cancelled and the plugin stops its work. Idempotent."""
        self._over = True
        if self._call is not None:
            await self._call.aclose()

    def _started(self) -> RpcCall:
        if self._call is None:
            self._call = self._link.open(self._rpc, *self._request, timeout=self._timeout)
        return self._call

    async def _read(self) -> Any:
        """Return the next message. Raises StopAsyncIteration at the end, or the error of the call."""
        try:
            if self._over:
                raise StopAsyncIteration
            call = self._started()
            message = await self._link.attempt(call.read())
            if message is None:
                raise StopAsyncIteration
            if self._checked:
                await self._link.check(message, call)
        except BaseException as error:
            over = self._over
            await self.aclose()
            if over and isinstance(error, EnginePluginError):
                raise StopAsyncIteration from None  # another task has closed this stream
            raise
        return message


class DuplexCall(StreamedCall):
    """A call in which both sides send messages, in any order."""

    async def write(self, message: Message) -> None:
        """Send a message; waits if the plugin reads slowly."""
        await self._link.attempt(self._started().write(sendable(message)))

    async def done_sending(self) -> None:
        """Half-close the call: no more messages follow; answers can still arrive."""
        await self._link.attempt(self._started().done_writing())


class ChunkStream(StreamedCall):
    """The chunks of a streamed answer: `async with client.stream(…) as chunks: async for chunk in chunks`.

    Chunk boundaries have no meaning; `host.events` decodes the chunks into JSON objects. Leaving the context, or
    `aclose`, cancels the call. The iteration raises the plugin's error.
    """

    def __init__(self, link: Link, timeout: float | None, request: pb.InvokeServiceRequest) -> None:
        super().__init__(link, "InvokeServiceStream", timeout, request)
        self.metadata: dict[str, str] = {}
        """The metadata of the messages so far."""

    async def __anext__(self) -> bytes:
        while True:
            message: pb.InvokeServiceStreamResponse = await self._read()
            self.metadata.update(message.metadata)
            self._over = message.is_final
            if message.chunk_data:
                return message.chunk_data


@dataclass(frozen=True, slots=True)
class BidiMessage:
    """One message of a conversation; `type` is "text" or "binary"."""

    data: bytes
    type: str = "binary"
    metadata: dict[str, str] = field(default_factory=dict)


class BidiCall(DuplexCall):
    """A conversation with a service: `send` and iterate, in any order. Leaving the context cancels it."""

    def __init__(self, link: Link, timeout: float | None, service: str, auth: str) -> None:
        super().__init__(link, "InvokeServiceBidi", timeout)
        self._service = service
        self._auth = auth
        self._first = True

    async def send(self, data: bytes | str, *, metadata: Mapping[str, str] | None = None) -> None:
        """Send bytes as a binary message or a string as a text message; waits if the plugin reads slowly."""
        text = isinstance(data, str)
        message = pb.InvokeServiceBidiRequest(
            service_name=self._service,
            data=data.encode() if isinstance(data, str) else data,
            message_type="text" if text else "binary",
            metadata=metadata or {},
            is_first=self._first,
            auth_info=self._auth,
        )
        self._first = False
        try:
            await self.write(message)
        except CallEnded:
            raise BadGatewayError(_ENDED) from None

    async def __anext__(self) -> BidiMessage:
        message: pb.InvokeServiceBidiResponse = await self._read()
        return BidiMessage(message.data, message.message_type, dict(message.metadata))
