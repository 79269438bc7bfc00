"""The interface of the plugin that goplugin serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from typing import TypeAlias

    from engine_plugin.goplugin.handshake import HostEnv
    from engine_plugin.server.seam import RpcService

    Load: TypeAlias = Callable[[HostEnv], Awaitable["HostedPlugin"]]

__all__ = ["HostedPlugin"]


class HostedPlugin(Protocol):
    """The plugin as a session serves it: its gRPC services, and how to close it."""

    @property
    def services(self) -> Sequence[RpcService]:
        """Served beside go-plugin's services; read once, before the handshake."""

    async def aclose(self) -> None:
        """Stop the engine and release everything. Cancelled after 1.2 s, when the process exits."""
