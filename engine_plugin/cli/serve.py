"""`engine-plugin serve`: runs a plugin without a host, by hand or for `engine start`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine_plugin import catalogue
from engine_plugin.cli.listener import listening
from engine_plugin.cli.logs import set_up_logging
from engine_plugin.cli.options import Command
from engine_plugin.cli.output import report, say
from engine_plugin.cli.plugins import chosen_manifest
from engine_plugin.errors import DeadlineError, PreconditionError
from engine_plugin.system.addresses import SOCKET_PATH_LIMIT, grpc_target, host_of, is_loopback, unix_path
from engine_plugin.waiting import handling_signals, run_to_the_end

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from engine_plugin.cli.context import Options
    from engine_plugin.manifest import Manifest

__all__ = ["LOG_VARIABLE", "serve"]

# Set by `engine start`: the log file, which the record passes on to `engine status`.
LOG_VARIABLE = "ENGINE_PLUGIN_SERVER_LOG"

_ENGINE_STOP = 30.0  # seconds; the bound of the engine's own stop is well below
_LAST_PORT = 65535


@click.command(cls=Command)
@click.option("--address", metavar="ADDRESS", help="unix:/path or host:port. [default: a private socket]")
@click.option("--allow-remote", is_flag=True, help="Allow an address that other machines can reach. There is no TLS.")
def serve(options: Options, address: str | None, allow_remote: bool) -> None:
    """Serve the plugin without a host until Ctrl-C or SIGTERM, then stop the engine."""
    if address is not None:
        _check_form(address)
    if address is not None and not allow_remote and unix_path(address) is None and not is_loopback(address):
        raise click.UsageError(
            f"{address} is reachable from other machines, which could use and stop the engine. "
            "Use 127.0.0.1, or confirm with --allow-remote"
        )
    set_up_logging("DEBUG" if options.verbose else "INFO")
    os.umask(0o077)  # new files, those of engines included, are for this user only
    run_to_the_end(_serve(options, chosen_manifest(options), address))


async def _serve(options: Options, manifest: Manifest, address: str | None) -> None:
    from engine_plugin.app import build
    from engine_plugin.cli.orphans import reaping_orphans
    from engine_plugin.system.limits import raise_file_limit

    raise_file_limit()
    reaping = reaping_orphans() if os.getpid() == 1 else contextlib.nullcontext()
    with _address_source(manifest, address) as (choose, on_bound), _stop_signals() as stopped, reaping:
        plugin = build(manifest)
        try:
            async with listening(plugin.services, choose, on_bound) as bound:
                _announce(options, manifest, bound)
                await stopped.wait()
                say("stopping the engine")
        finally:
            await _close(plugin.aclose())


async def _close(closing: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(_ENGINE_STOP):
            await closing
    except TimeoutError:
        raise DeadlineError(f"the engine did not stop within {_ENGINE_STOP:g} s; it ends with this process") from None


@contextmanager
def _address_source(
    manifest: Manifest, address: str | None
) -> Iterator[tuple[Callable[[], str], Callable[[str], None]]]:
    """Yield two callbacks: the first returns an address to listen at, the second receives the bound one.

    For the default address a record exists until the end of the block.
    """
    if address is not None:
        yield lambda: _free(address), lambda _bound: None
        return
    from filelock import Timeout

    from engine_plugin.cli.server_record import ServerRecord, ServerRecordStore

    records = ServerRecordStore(manifest)
    lock = records.lock
    try:
        lock.acquire()
    except Timeout:
        record = records.find()
        who = f" at {record.address} (pid {record.pid})" if record else ""
        raise PreconditionError(
            f"{manifest.provider.name} is already running{who}. Use it, stop it (engine-plugin engine stop), "
            "or choose another --address"
        ) from None
    with ExitStack() as cleanup:
        cleanup.callback(lock.release)
        cleanup.callback(records.forget)

        def on_bound(bound: str) -> None:
            records.write(ServerRecord.of_this_process(bound, os.environ.get(LOG_VARIABLE, "")))

        yield lambda: records.choose(cleanup), on_bound


@contextmanager
def _stop_signals() -> Iterator[asyncio.Event]:
    """Yield an event that Ctrl-C or SIGTERM sets. A second signal of the same kind ends the process at once."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        loop.call_soon_threadsafe(stopped.set)

    with handling_signals([signal.SIGINT, signal.SIGTERM], stop):
        yield stopped


def _announce(options: Options, manifest: Manifest, address: str) -> None:
    path = unix_path(address)
    if path is not None:
        address = f"unix:{Path(path).absolute()}"
    where = address if path is None else grpc_target(address).replace("unix:", "unix://", 1)
    grpcurl = f"grpcurl -plaintext {where} protocol.ProviderService/GetManifest"
    name = manifest.provider.name
    value = {"plugin": name, "address": address, "pid": os.getpid(), "grpcurl": grpcurl}
    report(options, value, f"serving {name} at {address}", f"try: {grpcurl}")


def _check_form(address: str) -> None:
    """Raise UsageError for an invalid address; gRPC would wrap a port of 99999 to another one."""
    path = unix_path(address)
    _, colon, port = address.rpartition(":")
    is_port = colon and port.isascii() and port.isdecimal() and int(port) <= _LAST_PORT
    if not (is_port if path is None else path):
        raise click.UsageError(f"--address {address}: must be unix:/path, or host:port with a port from 0 to 65535")


def _free(address: str) -> str:
    """Return the address if it is free and usable. Raises PreconditionError.

    gRPC would replace the socket of a running server by its own.
    """
    name = unix_path(address)
    if name is not None:
        if sys.platform == "win32":
            return address
        path = Path(name)
        _check_place(address, path)
        if path.exists() and not path.is_socket():
            raise catalogue.ADDRESS_TAKEN.error(address=address, holder="path exists and is not a socket")
    if _is_served(address):
        raise catalogue.ADDRESS_TAKEN.error(address=address, holder="address already in use")
    return address


def _is_served(address: str) -> bool:
    """Return whether a server accepts connections at the address."""
    path = unix_path(address)
    try:
        if path is None:
            socket.create_connection((host_of(address), int(address.rpartition(":")[2])), timeout=1).close()
        elif sys.platform != "win32":
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1)
                probe.connect(path)
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _check_place(address: str, path: Path) -> None:
    """Raise PreconditionError if no socket can be created at the path; gRPC's own error has no reason."""
    size = len(os.fsencode(path))
    if size > SOCKET_PATH_LIMIT:
        raise PreconditionError(
            f"{address}: the socket path has {size} bytes; the limit of the system is {SOCKET_PATH_LIMIT}. "
            "Choose a shorter --address"
        )
    if not path.parent.is_dir():
        folder = shlex.quote(str(path.parent))
        raise PreconditionError(f"{address}: {path.parent} is not a directory. Create it: mkdir -p -m 700 {folder}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PreconditionError(f"{address}: no write permission for {path.parent}. Choose another --address")
