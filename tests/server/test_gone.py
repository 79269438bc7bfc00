"""A host that leaves during a send: gRPC fails the send before it cancels the call."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import grpc.aio
import pytest

from engine_plugin.download.events import StepStarted
from engine_plugin.messages import ConversationMessage
from engine_plugin.protocol.stubs import provider_pb2 as pb
from engine_plugin.protocol.stubs.goplugin import broker_pb2
from engine_plugin.server import grpc_aio, new_server
from engine_plugin.server.seam import RpcService
from engine_plugin.server.servicer import provider_service
from tests.patience import LIMIT, within

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from engine_plugin.plugin import Plugin
    from engine_plugin.server.seam import Call


class Talker:
    """A plugin that sends without end."""

    def __init__(self) -> None:
        self.left = False

    @asynccontextmanager
    async def stream(self, *_: object) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._said(b"data: {}\n\n") as said:
            yield said

    @asynccontextmanager
    async def converse(self, *_: object) -> AsyncIterator[AsyncIterator[ConversationMessage]]:
        async with self._said(ConversationMessage(b"", "text", {})) as said:
            yield said

    @asynccontextmanager
    async def pull_model(self, _request: object) -> AsyncIterator[AsyncIterator[StepStarted]]:
        async with self._said(StepStarted("pulling")) as said:
            yield said

    @asynccontextmanager
    async def _said(self, what: Any) -> AsyncIterator[AsyncIterator[Any]]:
        async def ever() -> AsyncIterator[Any]:
            while True:
                yield what

        try:
            yield ever()
        finally:
            self.left = True


class Gone:
    """gRPC's side of a call whose host has just left. Everything sent is counted."""

    def __init__(self, error: type[Exception], request: object) -> None:
        self._error = error
        self._request = request
        self.sends = 0

    async def read(self) -> object:
        return self._request

    def set_trailing_metadata(self, _metadata: object) -> None:
        pass

    async def write(self, _message: object) -> None:
        self.sends += 1
        raise self._error("Failed grpc_call_start_batch")


@pytest.mark.parametrize("error", [grpc.aio.InternalError, grpc.aio.UsageError])
@pytest.mark.parametrize(
    ("rpc", "request_"),
    [
        ("InvokeServiceStream", pb.InvokeServiceRequest(service_name="chat", request_data=b"{}")),
        ("InvokeServiceBidi", pb.InvokeServiceBidiRequest(service_name="speech-to-text-ws")),
        ("PullModelStream", pb.PullModelStreamRequest(request_json=b'{"model": "a"}')),
    ],
)
async def test_host_that_leaves_during_a_send_is_not_logged_as_a_failure(
    rpc: str, request_: object, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    plugin, context = Talker(), Gone(error, request_)
    descriptor, servicer = provider_service(cast("Plugin", plugin))
    handler = grpc_aio.method_handler(descriptor.methods_by_name[rpc], getattr(servicer, rpc))
    serve = handler.stream_stream if handler.request_streaming else handler.unary_stream
    with caplog.at_level(logging.INFO), pytest.raises(asyncio.CancelledError):
        await cast("Any", serve)(request_, context)
    assert context.sends == 1, "nothing is sent after the client left"
    assert plugin.left
    assert caplog.records == []


@pytest.mark.parametrize(("error", "logged"), [(grpc.aio.InternalError("Failed"), False), (ValueError("odd"), True)])
def test_grpcio_logs_no_error_for_a_host_that_left(
    error: Exception, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """grpcio sends a status when the handler is done, and logs an error when the client has left."""
    logging.getLogger("grpc._cython.cygrpc").error("%s raised in core", "x", exc_info=error)
    assert bool(caplog.records) is logged


class Broker:
    """Holds its stream, and takes some steps of the event loop to leave it."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.left = False

    async def StartStream(self, call: Call) -> None:  # noqa: N802  # the rpc's name
        self.begun.set()
        try:
            await call.receive()
        finally:
            for _ in range(20):
                with suppress(asyncio.CancelledError):  # grpcio ends the read first, and cancels the call after that
                    await asyncio.sleep(0)
            self.left = True


@pytest.mark.promise("G20")
async def test_stopped_server_has_no_running_calls(short_dir: Path) -> None:
    """An event loop that ends with tasks of grpcio's under way has grpcio log an error."""
    broker, server = Broker(), new_server()
    server.add(RpcService(broker_pb2.DESCRIPTOR.services_by_name["GRPCBroker"], broker))
    address = await server.start(f"unix:{short_dir / 'sock'}")
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.stream_stream("/plugin.GRPCBroker/StartStream")(timeout=LIMIT)
        await within(broker.begun.wait())
        await server.stop(0.3)
        assert broker.left
        call.cancel()
