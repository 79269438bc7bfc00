"""Opens a gRPC channel of this process's implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.rpc.choice import use_grpcio

if TYPE_CHECKING:
    from engine_plugin.host.seam import Channel
    from engine_plugin.system.certificates import Identity

__all__ = ["open_channel"]


def open_channel(address: str, identity: Identity | None = None, trusted: bytes = b"") -> Channel:
    """A channel to `unix:/path` or `host:port`; with an identity over TLS, to the holder of a certificate (PEM).

    Called by `launch` and `connect`. Raises EnginePluginError for an implementation that cannot be used.
    """
    if use_grpcio():
        from engine_plugin.host.grpc_aio import AioChannel

        return AioChannel(address, identity, trusted)
    from engine_plugin.host.native import NativeChannel, client_context

    return NativeChannel(address, client_context(identity, trusted) if identity is not None else None)
