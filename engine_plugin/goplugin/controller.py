"""go-plugin's way to end a plugin: an rpc after whose answer the process must exit (within 2 s, else SIGKILL)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.protocol.stubs.goplugin import controller_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine_plugin.server.seam import Call

__all__ = ["ControllerServicer"]


class ControllerServicer:
    """Answers plugin.GRPCController. `stop` only asks for the end: the server's grace lets the answer out first."""

    def __init__(self, stop: Callable[[str], None]) -> None:
        self._stop = stop

    async def Shutdown(self, _request: controller_pb2.Empty, _call: Call) -> controller_pb2.Empty:  # noqa: N802
        self._stop("the host asked")
        return controller_pb2.Empty()
