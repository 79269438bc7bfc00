"""gRPC's reflection service, under both of its names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import Default
from google.protobuf.message_factory import GetMessageClass

from engine_plugin.protocol.stubs.standard import reflection_pb2, reflection_v1alpha_pb2
from engine_plugin.rpc.status import GrpcStatus
from engine_plugin.server.seam import RpcService

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor

    from engine_plugin.server.seam import Call

__all__ = ["reflection"]

_SERVICES: list[ServiceDescriptor] = [
    file.DESCRIPTOR.services_by_name["ServerReflection"] for file in (reflection_pb2, reflection_v1alpha_pb2)
]


def reflection(names: Iterable[str]) -> list[RpcService]:
    """The reflection services of a server that has services with these full names."""
    found = sorted({*names, *(service.full_name for service in _SERVICES)})
    return [RpcService(service, _Reflection(service, found)) for service in _SERVICES]


class _Reflection:
    def __init__(self, service: ServiceDescriptor, names: list[str]) -> None:
        self._response = GetMessageClass(service.methods_by_name["ServerReflectionInfo"].output_type)
        self._names = names

    async def ServerReflectionInfo(self, call: Call) -> None:
        while (request := await call.receive()) is not None:
            # Both versions have the same messages; the generated classes of the newer one stand for both.
            answer = self._answer(reflection_pb2.ServerReflectionRequest.FromString(request.SerializeToString()))
            await call.send(self._response.FromString(answer.SerializeToString()))

    def _answer(self, request: reflection_pb2.ServerReflectionRequest) -> reflection_pb2.ServerReflectionResponse:
        response = reflection_pb2.ServerReflectionResponse(valid_host=request.host, original_request=request)
        pool = Default()
        try:
            match request.WhichOneof("message_request"):
                case "list_services":
                    services = response.list_services_response.service
                    services.extend(reflection_pb2.ServiceResponse(name=name) for name in self._names)
                case "file_by_filename":
                    _add_files(response, pool.FindFileByName(request.file_by_filename))
                case "file_containing_symbol":
                    _add_files(response, _file_of(request.file_containing_symbol))
                case "file_containing_extension":
                    extension = request.file_containing_extension
                    message = pool.FindMessageTypeByName(extension.containing_type)
                    found = pool.FindExtensionByNumber(message, extension.extension_number)
                    _add_files(response, pool.FindFileContainingSymbol(found.full_name))
                case "all_extension_numbers_of_type":
                    message = pool.FindMessageTypeByName(request.all_extension_numbers_of_type)
                    numbers = response.all_extension_numbers_response
                    numbers.base_type_name = message.full_name
                    numbers.extension_number.extend(found.number for found in pool.FindAllExtensions(message))
                case _:
                    _fail(response, GrpcStatus.INVALID_ARGUMENT, "the request has no known field")
        except KeyError:
            _fail(response, GrpcStatus.NOT_FOUND, "not found")
        return response


def _file_of(symbol: str) -> FileDescriptor:
    """The file that defines a symbol. Raises KeyError."""
    pool = Default()
    try:
        return pool.FindFileContainingSymbol(symbol)
    except KeyError:  # it does not look for methods
        service, _, method = symbol.rpartition(".")
        return pool.FindServiceByName(service).methods_by_name[method].containing_service.file


def _add_files(response: reflection_pb2.ServerReflectionResponse, file: FileDescriptor) -> None:
    """Add a file, then those that it imports."""
    files: dict[str, FileDescriptor] = {}

    def visit(this: FileDescriptor) -> None:
        if this.name not in files:
            for imported in this.dependencies:
                visit(imported)
            files[this.name] = this

    visit(file)
    for each in reversed(files.values()):
        proto = FileDescriptorProto()
        each.CopyToProto(proto)
        response.file_descriptor_response.file_descriptor_proto.append(proto.SerializeToString())


def _fail(response: reflection_pb2.ServerReflectionResponse, status: GrpcStatus, message: str) -> None:
    response.error_response.error_code = status.value
    response.error_response.error_message = message
