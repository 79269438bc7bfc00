"""Where the plugin listens: a private unix socket, or a TCP port of 127.0.0.1 in the host's range."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import EnginePluginError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from engine_plugin.goplugin.early import EarlyListener
    from engine_plugin.goplugin.handshake import HostEnv
    from engine_plugin.server.native import NativeServer
    from engine_plugin.server.seam import RpcServer

__all__ = ["listening", "listening_early"]


@contextlib.asynccontextmanager
async def listening_early(server: NativeServer, early: EarlyListener) -> AsyncIterator[tuple[str, str]]:
    """As `listening`, on a socket that is announced already."""
    from engine_plugin.system.socketdir import keep_fresh, remove_stale

    directory = Path(early.directory)
    try:
        await server.adopt(early.take())
        remove_stale(directory.parent)
        async with _background(keep_fresh(directory)):
            yield "unix", early.path
    finally:
        early.close()


@contextlib.asynccontextmanager
async def listening(server: RpcServer, host: HostEnv) -> AsyncIterator[tuple[str, str]]:
    """Start `server` at the address that `host` asks for; the caller stops it. Called by `session`.

    Yields the network and the address as the handshake line gives them: `unix` and a path, or `tcp` and host:port.

    Raises EnginePluginError, with what to change, when neither the socket nor a port can be bound.
    """
    if host.transport == "tcp" or sys.platform == "win32":
        yield "tcp", await _listen_tcp(server, host.min_port, host.max_port)
        return
    from engine_plugin.system.socketdir import give_to_group, keep_fresh, private_directory

    with private_directory(host.socket_dir, host.socket_group) as directory:
        path = directory / "sock"
        _check_path(path, host.socket_dir)
        try:
            await server.start(f"unix:{path}")
        except OSError as error:
            raise EnginePluginError(f"cannot listen on {path}: {error}") from error
        if host.socket_group:
            give_to_group(path, host.socket_group, 0o660)
        async with _background(keep_fresh(directory)):
            yield "unix", str(path)


@contextlib.asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()


async def _listen_tcp(server: RpcServer, low: int, high: int) -> str:
    for port in range(low, high + 1):
        with contextlib.suppress(OSError):
            return await server.start(f"127.0.0.1:{port}")
    raise EnginePluginError(
        f"no port from {low} to {high} is free on 127.0.0.1. "
        "Free one, or widen PLUGIN_MIN_PORT and PLUGIN_MAX_PORT in the host's settings."
    )


def _check_path(path: Path, base: str) -> None:
    """Reject a socket path that the handshake line cannot hold; `base` is the directory that the host named, if any.

    Raises EnginePluginError naming the variable that the host must change.
    """
    if "|" in str(path) or "\n" in str(path):
        raise EnginePluginError(
            f"the socket's path {str(path)!r} holds a | or a line end, which the handshake line cannot carry. "
            f"Set {'PLUGIN_UNIX_SOCKET_DIR' if base else 'TMPDIR'} to another directory."
        )
