"""The listening address of `serve`, which is reopened if its socket is removed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine_plugin.errors import EnginePluginError, PreconditionError
from engine_plugin.system.addresses import socket_is_gone, unix_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from engine_plugin.server.seam import RpcServer, RpcService

__all__ = ["Listener", "listening"]

_LOOK = 1.0  # seconds between two checks of the socket
_TOUCH = 3600.0  # seconds; cleaners remove files untouched for days, in a runtime directory for six hours
_GRACE = 1.0  # seconds for running calls to end

log = logging.getLogger(__name__)


@dataclass
class Listener:
    """The servers of one plugin's services. `choose` returns an address, `on_bound` receives the bound one.

    A server whose socket was removed keeps its connections; another server accepts new ones. Used by `listening`.
    """

    services: Sequence[RpcService]
    choose: Callable[[], str]
    on_bound: Callable[[str], None]
    address: str = ""
    servers: list[RpcServer] = field(default_factory=list)
    touched: float = field(default_factory=time.monotonic)

    async def open(self) -> None:
        """Listen at the address that `choose` returns; a socket gets its mode from the umask of `serve`.

        Raises EnginePluginError if that fails.
        """
        from engine_plugin.server import new_server

        address = self.choose()
        server = new_server()
        for service in self.services:
            server.add(service)
        self.servers.append(server)
        try:
            self.address = await server.start(address)
        except OSError as error:
            reason = str(error.strerror).rstrip(".")
            raise PreconditionError(f"{address}: {reason}. Choose another --address") from error
        self.on_bound(self.address)

    async def watch(self) -> None:
        """Touch the socket hourly and reopen it if it is removed. Runs until it is cancelled."""
        path = unix_path(self.address)
        while path is not None:
            await asyncio.sleep(_LOOK)
            try:
                if time.monotonic() - self.touched > _TOUCH:
                    os.utime(path)
                    self.touched = time.monotonic()
                if socket_is_gone(self.address):
                    log.warning("the socket %s was removed; serving at a new one", path)
                    await self.open()
                    path = unix_path(self.address)
            except (OSError, EnginePluginError) as error:
                log.warning("cannot reopen the socket: %s", error)

    async def close(self) -> None:
        """Refuse new calls, let running ones end for a second, then stop the servers."""
        await asyncio.gather(*(server.stop(_GRACE) for server in self.servers))


@contextlib.asynccontextmanager
async def listening(
    services: Sequence[RpcService], choose: Callable[[], str], on_bound: Callable[[str], None]
) -> AsyncIterator[str]:
    """Serve inside the block; yield the first bound address. Raises EnginePluginError."""
    listener = Listener(services, choose, on_bound)
    try:
        await listener.open()
        watching = asyncio.create_task(listener.watch())
        try:
            yield listener.address
        finally:
            watching.cancel()
            await asyncio.wait({watching})
    finally:
        await listener.close()
