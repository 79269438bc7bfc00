"""The reflection service finds what clients ask for, under both of its names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from engine_plugin.host.native import NativeChannel
from engine_plugin.protocol.stubs.standard import reflection_pb2, reflection_v1alpha_pb2
from engine_plugin.server.native import NativeServer
from tests.patience import within

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("stubs", [reflection_pb2, reflection_v1alpha_pb2], ids=["v1", "v1alpha"])
async def test_symbols_are_found_in_their_files(stubs: Any, short_dir: Path) -> None:
    server = NativeServer()
    channel = NativeChannel(await server.start(f"unix:{short_dir}/s"))
    method = stubs.DESCRIPTOR.services_by_name["ServerReflection"].methods_by_name["ServerReflectionInfo"]
    health = "grpc.health.v1"
    try:
        call = channel.begin(method, timeout=None)
        for symbol in (f"{health}.Health", f"{health}.Health.Check", f"{health}.HealthCheckRequest"):
            await call.write(stubs.ServerReflectionRequest(file_containing_symbol=symbol))
            [file, *_] = (await within(call.read())).file_descriptor_response.file_descriptor_proto
            assert FileDescriptorProto.FromString(file).package == health
        for symbol in (f"{health}.Health.None", f"{health}.None.Check", "None", ""):
            await call.write(stubs.ServerReflectionRequest(file_containing_symbol=symbol))
            assert (await within(call.read())).error_response.error_code == 5
    finally:
        await channel.close()
        await server.stop(0)
