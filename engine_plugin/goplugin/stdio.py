"""go-plugin's stream of the plugin's standard output (GRPCStdio)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.protocol.stubs.goplugin import stdio_pb2

if TYPE_CHECKING:
    from google.protobuf.empty_pb2 import Empty

    from engine_plugin.goplugin.stdout import OutputBuffer
    from engine_plugin.server.seam import Call

__all__ = ["StdioServicer"]


class StdioServicer:
    """Answers plugin.GRPCStdio from a buffer. A host opens the stream once, right after it connects."""

    def __init__(self, buffer: OutputBuffer) -> None:
        self._buffer = buffer

    async def StreamStdio(self, _request: Empty, call: Call) -> None:  # noqa: N802 - the rpc's own name
        while data := await self._buffer.get():  # never empty: the host logs an error for that
            await call.send(stdio_pb2.StdioData(channel=stdio_pb2.StdioData.STDOUT, data=data))
