"""The gRPC server of a plugin: the seam, its two implementations, and ProviderService over `Plugin`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.rpc.choice import use_grpcio

if TYPE_CHECKING:
    from engine_plugin.server.seam import RpcServer

__all__ = ["new_server"]


def new_server(health_service: str = "plugin") -> RpcServer:
    """A gRPC server of this process's implementation; `health_service` is the name that health checks report."""
    if use_grpcio():
        from engine_plugin.server.grpc_aio import AioServer

        return AioServer(health_service)
    from engine_plugin.server.native import NativeServer

    return NativeServer(health_service)
