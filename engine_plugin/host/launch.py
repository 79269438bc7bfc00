"""Creates a PluginClient from a command or an address: spawn, handshake, connection, health check."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from google.protobuf.empty_pb2 import Empty

from engine_plugin.errors import NotFoundError, PluginProcessError, UnavailableError, UnsupportedError
from engine_plugin.host.channel import open_channel
from engine_plugin.host.client import PluginClient
from engine_plugin.host.handshake import plugin_environment
from engine_plugin.host.link import Link
from engine_plugin.host.logs import LineSplitter
from engine_plugin.host.process import PluginProcess
from engine_plugin.host.seam import RpcFailure
from engine_plugin.protocol.stubs.goplugin import broker_pb2, stdio_pb2
from engine_plugin.protocol.stubs.standard import health_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engine_plugin.host.handshake import Handshake
    from engine_plugin.host.logs import LogLine
    from engine_plugin.system.certificates import Identity

__all__ = ["LaunchOptions", "connect", "launch"]

_HEALTH_SERVICE = "plugin"


class LaunchOptions(TypedDict, total=False):
    """The options of `launch` that a registry passes on."""

    env: Mapping[str, str] | None
    start_timeout: float
    on_log: Callable[[LogLine], None] | None
    auto_mtls: bool


async def launch(
    command: Sequence[str],
    *,
    name: str = "",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    start_timeout: float = 10.0,
    on_log: Callable[[LogLine], None] | None = None,
    auto_mtls: bool = False,
) -> PluginClient:
    """Run `command` as a plugin and return its client once it is healthy, within `start_timeout` seconds.

    `env` is added to this process's environment. `on_log` receives every line that the plugin writes; it must not
    block. With `auto_mtls`, plugin and host use TLS and accept only each other's certificate. Raises
    PluginProcessError, with the plugin's last lines, if the command cannot be run, prints something other than a
    handshake line, exits, or takes too long. No process is left running then.
    """
    name = name or Path(command[0]).stem
    identity: Identity | None = None
    if auto_mtls:
        from engine_plugin.system.certificates import Identity

        identity = await asyncio.to_thread(Identity.create)
    environment = plugin_environment(env, identity.certificate_pem.decode() if identity else "")
    async with contextlib.AsyncExitStack() as undo:
        process = await PluginProcess.spawn(name, command, cwd=cwd, env=environment, on_log=on_log)
        undo.push_async_callback(process.end, 0)
        phase = "the handshake"
        try:
            async with asyncio.timeout(start_timeout):
                handshake = await process.handshake(auto_mtls)
                phase = "the health check"
                trusted = _certificate(name, handshake) if identity else b""
                channel = open_channel(handshake.address, identity, trusted)
                undo.push_async_callback(channel.close)
                link = Link(name, handshake.address, channel, process)
                background = [asyncio.create_task(_stdio(link, process)), asyncio.create_task(_broker(link))]
                for task in background:
                    undo.callback(task.cancel)
                await _wait_healthy(link)
        except TimeoutError:
            when = f"but had not completed {phase} within {start_timeout:g} s"
            raise PluginProcessError(process.describe(when)) from None
        undo.pop_all()
    return PluginClient(link, background)


async def connect(address: str, *, timeout: float = 5.0) -> PluginClient:
    """Connect to a plugin of another process at `unix:/path` (any path, not escaped) or `host:port`.

    `kill` of the client only closes the connection. Raises UnavailableError if no healthy plugin answers within
    `timeout` seconds.
    """
    channel = open_channel(address)
    link = Link(address, address, channel, None)
    try:
        async with asyncio.timeout(timeout):
            await _wait_healthy(link)
    except BaseException as error:
        await channel.close()
        if isinstance(error, TimeoutError):
            raise UnavailableError(f"no plugin answered at {address} within {timeout:g} s") from None
        raise
    return PluginClient(link)


def _certificate(name: str, handshake: Handshake) -> bytes:
    """The plugin's certificate as PEM."""
    from engine_plugin.system.certificates import der_to_pem

    try:
        return der_to_pem(handshake.certificate)
    except ValueError as error:
        raise PluginProcessError(f"plugin {name!r}: not a valid TLS certificate: {error}") from error


async def _wait_healthy(link: Link) -> None:
    check = health_pb2.DESCRIPTOR.services_by_name["Health"].methods_by_name["Check"]
    try:
        answer = await link.answer(link.begin(check, health_pb2.HealthCheckRequest(service=_HEALTH_SERVICE)))
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return
        state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    except (NotFoundError, UnsupportedError) as error:
        state = f"not supported ({error})"
    except UnavailableError as error:
        if link.process is None:
            raise
        raise PluginProcessError(f"plugin {link.name!r} cannot be reached at {link.address}: {error}") from error
    message = f"plugin {link.name!r}: health of service {_HEALTH_SERVICE!r}: expected SERVING, got {state}"
    raise PluginProcessError(message) if link.process else UnavailableError(message)


async def _stdio(link: Link, process: PluginProcess) -> None:
    """Log the output that the plugin sends over GRPCStdio, if it has that service."""
    call = link.begin(stdio_pb2.DESCRIPTOR.services_by_name["GRPCStdio"].methods_by_name["StreamStdio"], Empty())
    lines = {stdio_pb2.StdioData.STDOUT: LineSplitter(), stdio_pb2.StdioData.STDERR: LineSplitter()}
    with contextlib.suppress(RpcFailure):
        while (part := await call.read()) is not None:
            for line in lines[part.channel].feed(part.data) if part.channel in lines else ():
                process.log_output(line)


async def _broker(link: Link) -> None:
    """Keep the broker's stream open, as every go-plugin host does. This host brokers no connections."""
    call = link.begin(broker_pb2.DESCRIPTOR.services_by_name["GRPCBroker"].methods_by_name["StartStream"])
    with contextlib.suppress(RpcFailure):
        while await call.read() is not None:
            pass
