"""gRPC's interop TestService: its messages, and a servicer for the server seam."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_tools import protoc

from engine_plugin.rpc.status import GrpcStatus
from engine_plugin.server.seam import RpcError, RpcService

if TYPE_CHECKING:
    from google.protobuf.descriptor import MethodDescriptor

    from engine_plugin.server.seam import Call

__all__ = ["SERVICE", "TestService", "message", "rpc", "service"]

_PROTO = Path(__file__).with_suffix(".proto")


def _load() -> DescriptorPool:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "set")
        arguments = ["protoc", f"-I{_PROTO.parent}", f"--descriptor_set_out={out}", _PROTO.name]
        assert protoc.main(arguments) == 0
        pool = DescriptorPool()
        for file in FileDescriptorSet.FromString(out.read_bytes()).file:
            pool.Add(file)
        return pool


_POOL = _load()
SERVICE = _POOL.FindServiceByName("grpc.testing.TestService")


def rpc(name: str) -> MethodDescriptor:
    service = "UnimplementedService" if name == "UnimplementedCall" else SERVICE.name
    return _POOL.FindServiceByName(f"grpc.testing.{service}").methods_by_name[name]


def message(name: str, **fields: Any) -> Any:
    return GetMessageClass(_POOL.FindMessageTypeByName(f"grpc.testing.{name}"))(**fields)


def payload(size: int) -> Any:
    return message("Payload", body=bytes(size))


def _check(status: Any) -> None:
    """End the call with the status that the request asks for."""
    if status.code:
        raise RpcError(GrpcStatus(status.code), status.message)


class TestService:
    """Answers as gRPC's own interop servers do."""

    __test__ = False

    def __init__(self) -> None:
        self.running = 0
        """Calls under way."""

    async def EmptyCall(self, _request: Any, _call: Call) -> Any:
        return message("Empty")

    async def UnaryCall(self, request: Any, _call: Call) -> Any:
        _check(request.response_status)
        return message("SimpleResponse", payload=payload(request.response_size), server_id="the only one")

    async def StreamingOutputCall(self, request: Any, call: Call) -> None:
        await self._answer(request, call)

    async def StreamingInputCall(self, call: Call) -> Any:
        size = 0
        while (request := cast("Any", await call.receive())) is not None:
            size += len(request.payload.body)
        return message("StreamingInputCallResponse", aggregated_payload_size=size)

    async def FullDuplexCall(self, call: Call) -> None:
        self.running += 1
        try:
            while (request := cast("Any", await call.receive())) is not None:
                _check(request.response_status)
                await self._answer(request, call)
        finally:
            self.running -= 1

    async def HalfDuplexCall(self, call: Call) -> None:
        requests = []
        while (request := cast("Any", await call.receive())) is not None:
            requests.append(request)
        for request in requests:
            await self._answer(request, call)

    async def _answer(self, request: Any, call: Call) -> None:
        for wanted in request.response_parameters:
            if wanted.interval_us:
                await asyncio.sleep(wanted.interval_us / 1e6)
            await call.send(message("StreamingOutputCallResponse", payload=payload(wanted.size)))


def service(servicer: TestService | None = None) -> RpcService:
    return RpcService(SERVICE, servicer or TestService())
