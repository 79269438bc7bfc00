"""Restricts a gRPC server at a loopback TCP port to one user."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from engine_plugin.server.peers import REFUSED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from engine_plugin.server.peers import LocalPeers

__all__ = ["Gate", "method_kind"]


class Gate(grpc.aio.ServerInterceptor):
    """Intercepts every method, health and reflection included. `peers` checks the owner of each call.

    `running` holds the tasks of the calls under way.
    """

    def __init__(self) -> None:
        self.peers: LocalPeers | None = None
        self.running: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        task = asyncio.current_task()
        if task is not None:  # grpcio runs interceptors in the task that answers the call
            self.running.add(task)
            task.add_done_callback(self.running.discard)
        handler = await continuation(handler_call_details)
        return handler if self.peers is None or handler is None else _admitting(handler, self.peers)


def method_kind(streams_request: bool, streams_response: bool) -> str:
    """grpcio's name for a kind of method, such as unary_stream; a part of the names of its attributes."""
    return f"{'stream' if streams_request else 'unary'}_{'stream' if streams_response else 'unary'}"


def _admitting(handler: grpc.RpcMethodHandler[Any, Any], peers: LocalPeers) -> grpc.RpcMethodHandler[Any, Any]:
    """`handler` for callers that `peers` admits."""
    kind = method_kind(handler.request_streaming, handler.response_streaming)
    behavior = getattr(handler, kind)

    async def check(context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if not await peers.admits(context.peer()):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, REFUSED.message, tuple(REFUSED.metadata.items()))

    async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await check(context)
        return await behavior(request, context)

    async def answers(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        await check(context)
        async for message in behavior(request, context):
            yield message

    make: Callable[..., grpc.RpcMethodHandler[Any, Any]] = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        answers if inspect.isasyncgenfunction(behavior) else answer,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
