"""The plugin that goplugin serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from typing import Any, TypeAlias

    from engine_plugin.server.seam import RpcService

    Load: TypeAlias = Callable[[], Awaitable["HostedPlugin"]]

__all__ = ["HostedPlugin"]


@dataclass(frozen=True, slots=True)
class HostedPlugin:
    """A plugin that is ready to be served: its gRPC services, and how to close it.

    The services are read once, before the handshake, and served beside go-plugin's. `aclose` stops the engine and
    releases everything; under a host it is cancelled after 1.2 s, when the process exits.
    """

    services: Sequence[RpcService]
    aclose: Callable[[], Coroutine[Any, Any, None]]
