"""go-plugin's shutdown rpc (GRPCController): the process must exit within 2 s of the answer, else it gets SIGKILL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.protocol.stubs.goplugin import controller_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine_plugin.server.seam import Call

__all__ = ["ControllerServicer"]


class ControllerServicer:
    """Answers plugin.GRPCController. `stop` requests the shutdown; the server's grace period covers the answer."""

    def __init__(self, stop: Callable[[str], None]) -> None:
        self._stop = stop

    async def Shutdown(self, _request: controller_pb2.Empty, _call: Call) -> controller_pb2.Empty:  # noqa: N802
        self._stop("the host asked")
        return controller_pb2.Empty()
