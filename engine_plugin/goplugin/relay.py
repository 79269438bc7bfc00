"""A server of grpcio behind TLS. It listens by itself, at an address that only this process can reach.

grpcio cannot verify a host's certificate (go-plugin's are on P-521, grpc issue 41089). So the decrypted bytes go on
to a unix socket in a directory of its own, or, on Windows, to a port of 127.0.0.1 that asks for a certificate whose
key lives in this process alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.goplugin.tls import TlsServer
from engine_plugin.server.grpc_aio import AioServer
from engine_plugin.system.certificates import NAME, tls_context

if TYPE_CHECKING:
    from engine_plugin.goplugin.pipe import Dial
    from engine_plugin.server.seam import RpcServer

__all__ = ["RelayingTlsServer"]


class RelayingTlsServer(TlsServer):
    """The inner socket's private directory is created in `base` (empty: the temporary directory).

    With `loopback`, as on Windows, there is none.
    """

    def __init__(self, trusted: frozenset[bytes], base: str, *, loopback: bool = sys.platform == "win32") -> None:
        self._base = base
        self._loopback = loopback
        self._cleanup = contextlib.ExitStack()
        super().__init__(trusted)

    async def stop(self, grace: float) -> None:
        self._cleanup.close()  # accepted connections stay open
        await super().stop(grace)

    def _inner_server(self) -> RpcServer:
        return AioServer("plugin", only_for=self._identity if self._loopback else None)

    async def _dial(self) -> Dial:
        if self._loopback or sys.platform == "win32":
            return await self._on_loopback()
        from engine_plugin.system.socketdir import keep_fresh, private_directory

        # A separate directory: the group that may use the announced socket must not reach this one.
        directory = self._cleanup.enter_context(private_directory(self._base, ""))
        self._cleanup.callback(asyncio.create_task(keep_fresh(directory)).cancel)
        path = directory / "sock"
        await self._server.start(f"unix:{path}")
        return lambda protocol: asyncio.get_running_loop().create_unix_connection(protocol, str(path))

    async def _on_loopback(self) -> Dial:
        """Any local process may connect, but the handshake succeeds only with this process's own key."""
        host, _, port = (await self._server.start("127.0.0.1:0")).rpartition(":")
        trusted = {self._identity.certificate}
        with tempfile.TemporaryDirectory(prefix="engine-plugin-") as directory:
            context = tls_context(ssl.PROTOCOL_TLS_CLIENT, self._identity, trusted, Path(directory))
        return lambda protocol: asyncio.get_running_loop().create_connection(
            protocol, host, int(port), ssl=context, server_hostname=NAME
        )
