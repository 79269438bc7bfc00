"""gRPC's health and reflection services, for a server without grpcio."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import Default
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from engine_plugin.server.seam import GrpcStatus, RpcError, RpcService

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.descriptor import FileDescriptor

    from engine_plugin.server.seam import Call

__all__ = ["health", "reflection"]

_SERVING = health_pb2.HealthCheckResponse.SERVING
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
_REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]


def health(*names: str) -> RpcService:
    """The health service of a server: it and the services of these names are SERVING while it runs."""
    return RpcService(_HEALTH, _Health({"", *names}))


def reflection(names: Iterable[str]) -> RpcService:
    """The reflection service of a server with services of these full names, and health and reflection."""
    return RpcService(_REFLECTION, _Reflection(sorted({*names, _HEALTH.full_name, _REFLECTION.full_name})))


class _Health:
    def __init__(self, names: set[str]) -> None:
        self._names = names

    async def Check(self, request: health_pb2.HealthCheckRequest, _call: Call) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            raise RpcError(GrpcStatus.NOT_FOUND, f"no service is called {request.service!r}")
        return health_pb2.HealthCheckResponse(status=_SERVING)

    async def List(self, _request: health_pb2.HealthListRequest, _call: Call) -> health_pb2.HealthListResponse:
        answer = health_pb2.HealthCheckResponse(status=_SERVING)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._names, answer))

    async def Watch(self, request: health_pb2.HealthCheckRequest, call: Call) -> None:
        known = request.service in self._names
        state = _SERVING if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        await call.send(health_pb2.HealthCheckResponse(status=state))
        await asyncio.get_running_loop().create_future()  # nothing changes until the call or the server ends


class _Reflection:
    def __init__(self, names: list[str]) -> None:
        self._names = names

    async def ServerReflectionInfo(self, call: Call) -> None:
        while isinstance(request := await call.receive(), reflection_pb2.ServerReflectionRequest):
            await call.send(self._answer(request))

    def _answer(self, request: reflection_pb2.ServerReflectionRequest) -> reflection_pb2.ServerReflectionResponse:
        response = reflection_pb2.ServerReflectionResponse(valid_host=request.host, original_request=request)
        wanted = request.WhichOneof("message_request")
        try:
            if wanted == "list_services":
                response.list_services_response.service.extend(
                    reflection_pb2.ServiceResponse(name=name) for name in self._names
                )
            elif wanted == "file_by_filename":
                _add_files(response, Default().FindFileByName(request.file_by_filename))
            elif wanted == "file_containing_symbol":
                _add_files(response, Default().FindFileContainingSymbol(request.file_containing_symbol))
            elif wanted == "file_containing_extension":
                extension = request.file_containing_extension
                message = Default().FindMessageTypeByName(extension.containing_type)
                found = Default().FindExtensionByNumber(message, extension.extension_number)
                _add_files(response, Default().FindFileContainingSymbol(found.full_name))
            elif wanted == "all_extension_numbers_of_type":
                message = Default().FindMessageTypeByName(request.all_extension_numbers_of_type)
                numbers = response.all_extension_numbers_response
                numbers.base_type_name = message.full_name
                numbers.extension_number.extend(found.number for found in Default().FindAllExtensions(message))
            else:
                _fail(response, GrpcStatus.INVALID_ARGUMENT, "the request has no field that is known")
        except KeyError:
            _fail(response, GrpcStatus.NOT_FOUND, "not found")
        return response


def _add_files(response: reflection_pb2.ServerReflectionResponse, file: FileDescriptor) -> None:
    """Add a file, and those that it imports, each after its imports."""
    files: dict[str, FileDescriptor] = {}

    def visit(this: FileDescriptor) -> None:
        if this.name not in files:
            for imported in this.dependencies:
                visit(imported)
            files[this.name] = this

    visit(file)
    for each in reversed(files.values()):  # the one that was asked for comes first
        proto = FileDescriptorProto()
        each.CopyToProto(proto)
        response.file_descriptor_response.file_descriptor_proto.append(proto.SerializeToString())


def _fail(response: reflection_pb2.ServerReflectionResponse, status: GrpcStatus, message: str) -> None:
    response.error_response.error_code = status.value
    response.error_response.error_message = message
