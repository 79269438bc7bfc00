"""`engine-plugin engine`: the engine's software, and its server in the background."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from engine_plugin.cli.context import Options, advised
from engine_plugin.cli.options import Group
from engine_plugin.cli.output import print_fields, print_json, report, say
from engine_plugin.cli.plugins import chosen_manifest
from engine_plugin.cli.progress import progress_display
from engine_plugin.cli.session import plugin
from engine_plugin.cli.status import STOPPED, health_of
from engine_plugin.errors import EngineNotInstalledError, EnginePluginError, UnavailableError
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from engine_plugin.cli.progress import Show
    from engine_plugin.cli.server_record import ServerRecord
    from engine_plugin.host import LogLine, PluginClient

__all__ = ["engine"]

_STOP_ENGINE = 30.0
_QUICK = 10.0
_NOT_RUNNING = 4
_SHOWN = ("plugin", "state", "version", "address", "pid", "log")


@click.group(cls=Group)
def engine() -> None:
    """Manage the engine: check, install, upgrade, start, stop, status."""


@engine.command()
async def check(options: Options) -> None:
    """Show whether the engine's software is installed. Exits with 4 if it is not."""
    async with plugin(options) as client:
        found = await client.check_engine(timeout=_QUICK)
    value = {"installed": found.installed, "detail": found.detail}
    report(options, value, *([f"installed: {found.detail}"] if found else []))
    if not found:
        # The detail may have its own remedy.
        way = "" if ". " in found.detail else ". Install it: engine-plugin engine install"
        raise EngineNotInstalledError(f"not installed: {found.detail}{way}")


@engine.command()
@click.option("--cover", is_flag=True, help="Reinstall, even if it is installed.")
async def install(options: Options, cover: bool) -> None:
    """Install the engine's software."""
    what = await _changed(options, lambda client: client.install_engine(cover=cover))
    report(options, {"installed": True, "detail": what}, f"installed: {what}")


@engine.command()
async def upgrade(options: Options) -> None:
    """Upgrade the software to the version in plugin.yaml. A running engine is moved to it."""
    what = await _changed(options, lambda client: client.upgrade_engine())
    report(options, {"detail": what}, what)


async def _changed(options: Options, change: Callable[[PluginClient], Awaitable[str]]) -> str:
    """Let the plugin change its engine's software and show the progress."""
    try:
        with progress_display(as_json=False) as show:
            async with plugin(options, on_log=lambda line: _show_line(line, show)) as client:
                return await change(client)
    except asyncio.CancelledError:
        say("cancelled; the installed software is unchanged. Run the command again: archive downloads resume")
        raise


@engine.command()
@click.option("--mode", default="auto", show_default=True, help="auto, cpu, gpu or npu.")
async def start(options: Options, mode: str) -> None:
    """Serve the plugin in the background and start its engine. Does nothing if it is running."""
    from engine_plugin.cli.daemon import end_server, start_server
    from engine_plugin.cli.server_record import ServerRecordStore

    manifest = chosen_manifest(options)
    records = ServerRecordStore(manifest)
    record = records.find()
    in_process = record is None
    if record is None:
        record = await start_server(manifest)
    try:
        async with await records.reach(record) as client:
            await client.start_engine(mode)
    except BaseException:
        if in_process:
            await end_server(record)  # its engine did not start
        raise
    lines = [f"{manifest.provider.name} is running at {record.address} (pid {record.pid})"]
    lines += [f"log: {record.log}"] if record.log else []
    report(options, {"address": record.address, "pid": record.pid, "log": record.log}, *lines)


@engine.command()
async def stop(options: Options) -> None:
    """Stop the engine and its background server."""
    from engine_plugin.cli.daemon import end_server
    from engine_plugin.cli.server_record import ServerRecordStore

    manifest = chosen_manifest(options)
    records = ServerRecordStore(manifest)
    record = records.find()
    if record is None:
        raise UnavailableError(f"{manifest.provider.name} is not running; nothing to stop")
    try:
        async with await records.reach(record) as client:
            await client.stop_engine(timeout=_STOP_ENGINE)
    except EnginePluginError as error:
        say(f"the engine did not stop ({error}); ending its server")
    finally:
        await end_server(record)
    report(options, {"stopped": record.pid}, f"{manifest.provider.name} is stopped")


@engine.command()
async def status(options: Options) -> None:
    """Show state, version, address and loaded models. Exits with 4 if the engine is not running."""
    from engine_plugin.cli.server_record import ServerRecordStore

    manifest = chosen_manifest(options)
    async with plugin(options) as client:  # without a server too: an attached engine may be running
        record = ServerRecordStore(manifest).find()  # read again: the socket may have been replaced
        shown: dict[str, Any] = {"plugin": manifest.provider.name, **await _found(client, record)}
    if options.json:
        print_json(shown)
    else:
        _print_status(shown)
    if not shown["running"]:
        if shown["state"] == STOPPED and record is None and not options.json:
            say(f"start it: engine-plugin engine {'start' if shown['installed'] else 'install'}")
        click.get_current_context().exit(_NOT_RUNNING)


async def _found(client: PluginClient, record: ServerRecord | None) -> dict[str, Any]:
    running, state = await health_of(client)
    found: dict[str, Any] = {"running": running, "state": state}
    found["installed"] = running or bool(await client.check_engine(timeout=_QUICK))
    if running or record is not None:
        found["version"] = await client.get_version(timeout=_QUICK)
    if record is not None:
        found |= {"address": record.address, "pid": record.pid, "log": record.log}
    return found | {"models": await client.running_models(timeout=_QUICK) if running else []}


def _print_status(shown: dict[str, Any]) -> None:
    print_fields({key: advised(str(shown.get(key) or "")) for key in _SHOWN})
    for model in shown["models"]:
        print_fields({"model": f"{model.get('name', '?')} ({byte_size(model.get('size', 0))})"})


def _show_line(line: LogLine, show: Show) -> None:
    """Show an installation step from the plugin's log."""
    if "progress" not in line.kv:
        return
    completed, total, digest = (line.kv.get(name) for name in ("completed", "total", "digest"))
    if isinstance(completed, int) and isinstance(total, int):
        show({"status": "downloading", "completed": completed, "total": total, "digest": str(digest or "")})
    else:
        show({"status": line.message})
