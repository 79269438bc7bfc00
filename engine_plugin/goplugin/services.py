"""go-plugin's own services, which a plugin answers beside those of its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.protocol.stubs.goplugin import broker_pb2, controller_pb2, stdio_pb2
from engine_plugin.server.seam import RpcService

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.protobuf.empty_pb2 import Empty

    from engine_plugin.goplugin.stdout import OutputBuffer
    from engine_plugin.server.seam import Call

__all__ = ["own_services"]


def own_services(output: OutputBuffer, stop: Callable[[str], None]) -> Sequence[RpcService]:
    """GRPCStdio sends `output`; GRPCController calls `stop` with the reason; GRPCBroker does nothing."""
    return (
        RpcService(stdio_pb2.DESCRIPTOR.services_by_name["GRPCStdio"], _Stdio(output)),
        RpcService(controller_pb2.DESCRIPTOR.services_by_name["GRPCController"], _Controller(stop)),
        RpcService(broker_pb2.DESCRIPTOR.services_by_name["GRPCBroker"], _Broker()),
    )


class _Stdio:
    """The stream of the plugin's standard output. A host opens it once, right after it connects."""

    def __init__(self, output: OutputBuffer) -> None:
        self._output = output

    async def StreamStdio(self, _request: Empty, call: Call) -> None:  # noqa: N802 - the rpc's own name
        while data := await self._output.get():  # never empty: the host logs an error for that
            await call.send(stdio_pb2.StdioData(channel=stdio_pb2.StdioData.STDOUT, data=data))


class _Controller:
    """The shutdown: the process must exit within 2 s of the answer, else it gets SIGKILL.

    `stop` only requests it; the server's grace period covers the answer.
    """

    def __init__(self, stop: Callable[[str], None]) -> None:
        self._stop = stop

    async def Shutdown(self, _request: controller_pb2.Empty, _call: Call) -> controller_pb2.Empty:  # noqa: N802
        self._stop("the host asked")
        return controller_pb2.Empty()


class _Broker:
    """The broker of further connections. None is brokered, but hosts open its stream."""

    async def StartStream(self, call: Call) -> None:  # noqa: N802 - the rpc's own name
        while await call.receive() is not None:
            pass
