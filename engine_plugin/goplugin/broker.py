"""go-plugin's broker of further connections (GRPCBroker). No connection is brokered, but hosts open its stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine_plugin.server.seam import Call

__all__ = ["BrokerServicer"]


class BrokerServicer:
    """Answers plugin.GRPCBroker: reads and ignores the stream until the host ends it."""

    async def StartStream(self, call: Call) -> None:  # noqa: N802 - the rpc's own name
        while await call.receive() is not None:
            pass
