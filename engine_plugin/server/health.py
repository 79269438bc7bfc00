"""gRPC's health service. The server and the services that it names are SERVING for as long as it runs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from engine_plugin.protocol.stubs.standard import health_pb2
from engine_plugin.rpc.status import GrpcStatus
from engine_plugin.server.seam import RpcError, RpcService

if TYPE_CHECKING:
    from engine_plugin.server.seam import Call

__all__ = ["health"]

_SERVING = health_pb2.HealthCheckResponse.SERVING


def health(*names: str) -> RpcService:
    """The health service of a server that has services with these names."""
    return RpcService(health_pb2.DESCRIPTOR.services_by_name["Health"], _Health({"", *names}))


class _Health:
    def __init__(self, names: set[str]) -> None:
        self._names = names

    async def Check(self, request: health_pb2.HealthCheckRequest, _call: Call) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            raise RpcError(GrpcStatus.NOT_FOUND, f"there is no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=_SERVING)

    async def List(self, _request: health_pb2.HealthListRequest, _call: Call) -> health_pb2.HealthListResponse:
        serving = health_pb2.HealthCheckResponse(status=_SERVING)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._names, serving))

    async def Watch(self, request: health_pb2.HealthCheckRequest, call: Call) -> None:
        known = request.service in self._names
        status = _SERVING if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        await call.send(health_pb2.HealthCheckResponse(status=status))
        await asyncio.get_running_loop().create_future()  # the status changes only when the server ends
