"""What goplugin is given to serve."""

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
    """What a host is given: the plugin's own gRPC services, and the way to end what lies behind them."""

    @property
    def services(self) -> Sequence[RpcService]:
        """Served beside go-plugin's own; read once, before the handshake."""

    async def aclose(self) -> None:
        """Stop the engine and let go of everything. Has 1.2 s, then it is cancelled and the process ends."""
