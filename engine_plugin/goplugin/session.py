"""One session under a host: load the plugin, listen, announce, serve until the shutdown, stop in time.

loading ──► listening ──► announced ──► stopping ──► exit 0
   │ error       │ error                   ▲
   └─► exit 1 ◄──┘        Shutdown rpc, SIGTERM, SIGHUP, the host's death (at any time from the start)

With an `EarlyListener` the line was printed before all of this, and connections wait for the end of the load.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import TYPE_CHECKING, Any, TypeVar

from engine_plugin.goplugin.handshake import handshake_line
from engine_plugin.goplugin.listen import listening, listening_early
from engine_plugin.goplugin.services import own_services
from engine_plugin.goplugin.watchdog import watching_host
from engine_plugin.rpc.choice import use_grpcio
from engine_plugin.server import new_server
from engine_plugin.waiting import handle_signal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from engine_plugin.goplugin.early import EarlyListener
    from engine_plugin.goplugin.handshake import HostEnv
    from engine_plugin.goplugin.stdout import StandardOutput
    from engine_plugin.goplugin.tls import TlsServer
    from engine_plugin.goplugin.watchdog import LastResort
    from engine_plugin.server.seam import HostedPlugin, RpcServer

__all__ = ["Session"]

# Seconds. The host kills the plugin 2 s after its Shutdown call, so everything up to the interpreter's exit must fit.
_GRACE = 0.3  # for running calls
_STOP_LIMIT = 1.2  # for the plugin's aclose, besides the grace period
_END_LIMIT = 1.6  # from the shutdown request to the exit

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Session:
    """One run of the plugin and what it holds. Created and run once by `serve.run`, inside the event loop.

    Raises EnginePluginError for a host's certificate that cannot be read.
    """

    def __init__(
        self, host: HostEnv, stdout: StandardOutput, last_resort: LastResort, early: EarlyListener | None = None
    ) -> None:
        self._host = host
        self._early = early
        self._trusted = _trusted(host.client_cert)
        self._stdout = stdout
        self._last_resort = last_resort
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[str] = self._loop.create_future()

    def stop(self, reason: str) -> None:
        """Request the shutdown; the first reason is logged. Called from any thread or a signal handler."""
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._set_stopped, reason)
        self._last_resort.arm(_END_LIMIT)

    async def run(self, load: Callable[[], Awaitable[HostedPlugin]], parent: int) -> None:
        """Run the session. `parent` is the host's pid. Raises what `load` raises, and EnginePluginError."""
        self._stop_on_signals()
        try:
            with self._stdout.waking_loop(), watching_host(parent, lambda: self.stop("the host has died")):
                plugin = await self._unless_stopped(load())
                if plugin is not None:
                    await self._serve(plugin)
            self._last_resort.exit_code = 0
        finally:
            self._last_resort.arm(_END_LIMIT)

    async def _serve(self, plugin: HostedPlugin) -> None:
        certificate = b""
        server: RpcServer
        if self._early is not None:
            from engine_plugin.server.native import NativeServer

            server = native = NativeServer()
            place = listening_early(native, self._early)
        else:
            server, certificate = self._server()
            place = listening(server, self._host)
        try:
            for service in (*own_services(self._stdout.buffer, self.stop), *plugin.services):
                server.add(service)
            async with place as (network, address):
                if self._early or self._announce(network, address, certificate):
                    _log.debug("serving", extra={"network": network, "address": address})
                    _log.info("stopping: %s", await self._stopped)
        finally:
            self._last_resort.arm(_END_LIMIT)
            self._stdout.close()
            # The server first: it removes its socket at once, even if the plugin's stop hangs.
            await _all_within(_STOP_LIMIT, {"server": server.stop(_GRACE), "plugin": plugin.aclose()})

    def _server(self) -> tuple[RpcServer, bytes]:
        """The server, and its certificate for a host with AutoMTLS. Imports block the loop, which is idle here."""
        if not self._trusted:
            return new_server(), b""
        server: TlsServer
        if use_grpcio():
            from engine_plugin.goplugin.relay import RelayingTlsServer

            server = RelayingTlsServer(self._trusted, self._host.socket_dir)
        else:
            from engine_plugin.goplugin.tls import TlsServer

            server = TlsServer(self._trusted)
        return server, server.certificate

    def _announce(self, network: str, address: str, certificate: bytes) -> bool:
        try:
            self._stdout.announce(handshake_line(self._host, network, address, certificate))
        except OSError as error:
            _log.error("the host took no handshake line and must have died: %s", error)
            return False
        return True

    def _stop_on_signals(self) -> None:
        for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is None or signal.getsignal(number) is signal.SIG_IGN:  # nohup ignores SIGHUP
                continue
            # Not the loop's handler: a blocked loop must not keep `stop` from arming the last resort.
            handle_signal(number, lambda number, _frame: self.stop(signal.Signals(number).name))

    def _set_stopped(self, reason: str) -> None:
        if not self._stopped.done():
            self._stopped.set_result(reason)

    async def _unless_stopped(self, work: Awaitable[_T]) -> _T | None:
        """The result of `work`; None, with `work` cancelled, if the shutdown was requested first."""
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._stopped}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        _log.info("stopping while loading: %s", self._stopped.result())
        task.cancel()
        await asyncio.wait({task}, timeout=_STOP_LIMIT)
        return None


def _trusted(client_cert: str) -> frozenset[bytes]:
    if not client_cert:
        return frozenset()
    from engine_plugin.goplugin.tls import host_certificates

    return host_certificates(client_cert)


async def _all_within(seconds: float, steps: dict[str, Coroutine[Any, Any, None]]) -> None:
    """Run all steps concurrently; log those that fail and cancel those that are late."""
    tasks = {asyncio.ensure_future(step): name for name, step in steps.items()}
    done, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
        _log.error("the %s did not stop within %.1f s", tasks[task], seconds)
    for task in done:
        if error := task.exception():
            _log.error("the %s did not stop cleanly: %s", tasks[task], error, exc_info=error)
