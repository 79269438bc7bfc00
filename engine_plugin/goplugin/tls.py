"""Mutual TLS in front of a gRPC server, for hosts with AutoMTLS: only that host's bytes reach the server.

    host ══ TLS ══ the announced address ── TlsServer ── gRPC server

A server of this package takes the decrypted bytes in memory; `goplugin.relay` has what grpcio needs in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from engine_plugin.errors import EnginePluginError
from engine_plugin.goplugin.pipe import Pipe, Pipes
from engine_plugin.rpc.memory import connect_in_memory
from engine_plugin.server.seam import RpcServer
from engine_plugin.system.certificates import Identity, pem_to_ders, tls_context

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine_plugin.goplugin.pipe import Dial
    from engine_plugin.server.native import NativeServer
    from engine_plugin.server.seam import RpcService

__all__ = ["TlsServer", "host_certificates", "outer_context"]

_LAST_BYTES = 0.3  # seconds to deliver the gRPC server's last bytes after it has stopped


def host_certificates(pem: str) -> frozenset[bytes]:
    """The host's certificates as DER, usually one. Raises EnginePluginError for invalid PEM."""
    try:
        return pem_to_ders(pem)
    except ValueError as error:
        raise EnginePluginError(
            f"PLUGIN_CLIENT_CERT holds no certificate in PEM that can be read: {error}. "
            "Correct it, or set AutoMTLS to false, in the host's settings."
        ) from error


class TlsServer(RpcServer):
    """A gRPC server behind TLS, for clients with one of the `trusted` certificates. Created by `session`.

    The handshake line announces `certificate` (DER) to the host.
    """

    def __init__(self, trusted: frozenset[bytes]) -> None:
        self._trusted = trusted
        self._identity = Identity.create()
        self.certificate = self._identity.certificate
        self._server = self._inner_server()
        self._pipes: Pipes | None = None
        self._listener: asyncio.Server | None = None

    def add(self, service: RpcService) -> None:
        self._server.add(service)

    async def start(self, address: str) -> str:
        """Listen at `address`. Raises OSError if it cannot be bound, EnginePluginError if no address would work."""
        bound = _bind(address)
        try:
            pipes = self._pipes = self._pipes or await self._start_inside()
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(lambda: Pipe(pipes), sock=bound)
        except BaseException:
            bound.close()
            raise
        if address.startswith("unix:"):
            return address
        return "{}:{}".format(*bound.getsockname())

    async def stop(self, grace: float) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._pipes is not None:
            self._pipes.shut()
        try:
            await self._server.stop(grace)
        finally:
            if self._pipes is not None:
                await self._pipes.close(_LAST_BYTES)

    async def _start_inside(self) -> Pipes:
        try:
            with tempfile.TemporaryDirectory(prefix="engine-plugin-") as directory:
                context = outer_context(self._identity, self._trusted, Path(directory))
            return Pipes(context, self._trusted, await self._dial())
        except OSError as error:
            raise EnginePluginError(f"cannot serve TLS: {error}") from error

    # Steps that differ with grpcio

    def _inner_server(self) -> RpcServer:
        """The server behind TLS."""
        from engine_plugin.server.native import NativeServer  # not above: with grpcio, ngh2 may not be installed

        return NativeServer()

    async def _dial(self) -> Dial:
        """Start the server behind TLS; returns what connects a protocol to it."""
        server = cast("NativeServer", self._server)
        server.open()

        async def dial(protocol: Callable[[], asyncio.BufferedProtocol]) -> None:
            connect_in_memory(server.connection(), protocol())

        return dial


def outer_context(identity: Identity, trusted: frozenset[bytes], directory: Path) -> ssl.SSLContext:
    """The TLS settings for the host. `directory` must be private: it briefly holds the encrypted key."""
    context = tls_context(ssl.PROTOCOL_TLS_SERVER, identity, trusted, directory)
    context.verify_mode = ssl.CERT_REQUIRED
    # No session tickets: each connection shows its certificate (TLS 1.3), and a write never waits for a read.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    return context


def _bind(address: str) -> socket.socket:
    """A socket that is bound to `unix:/path` or `host:port` and does not listen yet. Raises OSError."""
    with contextlib.ExitStack() as unless_bound:
        if sys.platform != "win32" and address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            bound = unless_bound.enter_context(socket.socket(socket.AF_UNIX))
            bound.bind(str(path))
            path.chmod(0o600)
        else:
            host, _, port = address.rpartition(":")
            bound = unless_bound.enter_context(socket.socket(socket.AF_INET))
            if sys.platform == "win32":
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            else:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, int(port)))
        unless_bound.pop_all()
    return bound
