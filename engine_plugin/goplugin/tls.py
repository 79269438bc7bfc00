"""Mutual TLS in front of a gRPC server, for hosts with AutoMTLS: only that host's bytes reach the server.

    host ══ TLS ══ the announced address ── TlsServer ── private socket ── gRPC server

grpcio cannot verify a host's certificate (go-plugin's are on P-521, grpc issue 41089), so `ssl` does, and the bytes
go on to a server that only this process can reach: by a unix socket in a directory of its own, or, on Windows, by a
port of 127.0.0.1 that asks for a certificate whose key lives in this process alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.errors import EnginePluginError
from engine_plugin.goplugin.pipe import Pipe, Pipes
from engine_plugin.server.grpc_aio import AioServer
from engine_plugin.server.seam import RpcServer
from engine_plugin.system.certificates import NAME, Identity, load_identity, pem_to_ders

if TYPE_CHECKING:
    from engine_plugin.goplugin.pipe import Dial
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

    The handshake line announces `certificate` (DER) to the host. The inner socket's private directory is created in
    `base` (empty: the temporary directory); with `loopback`, as on Windows, there is none.
    """

    def __init__(self, trusted: frozenset[bytes], base: str, *, loopback: bool = sys.platform == "win32") -> None:
        self._trusted = trusted
        self._base = base
        self._loopback = loopback
        self._identity = Identity.create()
        self.certificate = self._identity.certificate
        self._server = AioServer(health_service="plugin", only_for=self._identity if loopback else None)
        self._cleanup = contextlib.ExitStack()
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
        self._cleanup.close()  # accepted connections stay open
        if self._pipes is not None:
            self._pipes.shut()
        try:
            await self._server.stop(grace)
        finally:
            if self._pipes is not None:
                await self._pipes.close(_LAST_BYTES)

    async def _start_inside(self) -> Pipes:
        """Start the gRPC server at an address that only this process can reach."""
        directory = self._private_directory()
        try:
            dial = await self._on_loopback(directory) if self._loopback else await self._on_socket(directory)
            return Pipes(outer_context(self._identity, self._trusted, directory), self._trusted, dial)
        except OSError as error:
            raise EnginePluginError(f"cannot serve TLS: {error}") from error

    def _private_directory(self) -> Path:
        if self._loopback or sys.platform == "win32":
            name = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="engine-plugin-"))
            return Path(name)
        from engine_plugin.system.socketdir import keep_fresh, private_directory

        # A separate directory: the group that may use the announced socket must not reach this one.
        directory = self._cleanup.enter_context(private_directory(self._base, ""))
        self._cleanup.callback(asyncio.create_task(keep_fresh(directory)).cancel)
        return directory

    async def _on_socket(self, directory: Path) -> Dial:
        path = directory / "sock"
        await self._server.start(f"unix:{path}")
        return lambda protocol: asyncio.get_running_loop().create_unix_connection(protocol, str(path))

    async def _on_loopback(self, directory: Path) -> Dial:
        """Any local process may connect, but the handshake succeeds only with this process's own key."""
        host, _, port = (await self._server.start("127.0.0.1:0")).rpartition(":")
        context = _context(ssl.PROTOCOL_TLS_CLIENT, self._identity, {self._identity.certificate}, directory)
        return lambda protocol: asyncio.get_running_loop().create_connection(
            protocol, host, int(port), ssl=context, server_hostname=NAME
        )


def outer_context(identity: Identity, trusted: frozenset[bytes], directory: Path) -> ssl.SSLContext:
    """The TLS settings for the host. `directory` must be private: it briefly holds the encrypted key."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity, trusted, directory)
    context.verify_mode = ssl.CERT_REQUIRED
    # No session tickets: each connection shows its certificate (TLS 1.3), and a write never waits for a read.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    return context


def _context(
    protocol: ssl._SSLMethod, identity: Identity, trusted: frozenset[bytes] | set[bytes], directory: Path
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust a certificate that is not self-signed, too
    context.load_verify_locations(cadata=b"".join(trusted))
    load_identity(context, identity, directory)
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
