"""`engine-plugin status`: the engine, the loaded models and the available models on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from engine_plugin.catalogue import ENGINE_NOT_RUNNING
from engine_plugin.cli.cells import print_models
from engine_plugin.cli.context import Options, advised
from engine_plugin.cli.options import Command
from engine_plugin.cli.output import print_fields, print_json, say
from engine_plugin.cli.plugins import chosen_manifest
from engine_plugin.cli.session import plugin
from engine_plugin.errors import AuthError, EnginePluginError, PreconditionError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from engine_plugin.cli.server_record import ServerRecord
    from engine_plugin.host import PluginClient

__all__ = ["STOPPED", "health_of", "status"]

_QUICK = 10.0
STOPPED = "stopped"
"""The state of a managed engine that has not been started."""

T = TypeVar("T")
U = TypeVar("U")


@click.command(cls=Command)
async def status(options: Options) -> None:
    """Show the engine (version, state, address), the models in memory and the available models.

    Without a running server, a plugin is launched for the query.
    """
    from engine_plugin.cli.server_record import ServerRecordStore

    manifest = chosen_manifest(options)
    async with plugin(options) as client:
        record = ServerRecordStore(manifest).find()  # read again: the socket may have been replaced
        shown = {"plugin": manifest.provider.name, "engine": manifest.engine_name} | await _found(client, record)
    if options.json:
        print_json(shown)
        return
    _print(shown)
    if shown["state"] == STOPPED:
        say(f"start it: engine-plugin engine {'start' if shown['installed'] else 'install'}")


async def _found(client: PluginClient, record: ServerRecord | None) -> dict[str, Any]:
    """Query the plugin. Values that it cannot provide are empty; the state has the reason."""
    running, state = await health_of(client)
    config = await client.get_config(timeout=_QUICK)
    check = await _or(client.check_engine(timeout=_QUICK), None)
    server = "managed" if config.get("exec_file") else "attached" if running else ""
    shows = server != "managed" and ":" in config.get("host", "")  # without a port the server's address is unknown
    return {
        "version": await _or(client.get_version(timeout=_QUICK), ""),
        "software": check.detail if check is not None else "",  # the detail is useful if not installed, too
        "installed": bool(check),
        "server": server,
        "address": f"{config.get('scheme') or 'http'}://{config['host']}" if shows else "",
        "running": running,
        "state": state,
        "plugin_address": record.address if record else "",
        "pid": record.pid if record else None,
        "log": record.log if record else "",
        "loaded": await _or(client.running_models(timeout=_QUICK), None) if running else [],
        "available": await _or(client.list_models(timeout=_QUICK), None),
    }


async def health_of(client: PluginClient) -> tuple[bool, str]:
    """Return whether the engine can serve, and its state in words."""
    try:
        return True, await client.health_check(timeout=_QUICK)
    except (UnavailableError, PreconditionError, AuthError) as error:
        return False, STOPPED if error.id == ENGINE_NOT_RUNNING.id else f"down: {error}"


async def _or(asked: Awaitable[T], otherwise: U) -> T | U:
    try:
        return await asked
    except EnginePluginError:
        return otherwise


def _print(shown: Mapping[str, Any]) -> None:
    # For other states, the state names what is missing.
    missing = shown["state"] == STOPPED and not shown["installed"]
    version = shown["version"] or ("not installed" if missing else "")
    whose = f"({shown['server']})" if shown["server"] else ""
    served = f" at {shown['plugin_address']} (pid {shown['pid']})" if shown["plugin_address"] else ""
    fields = {
        "engine": " ".join(filter(None, (shown["engine"], version, whose))),
        "state": advised(shown["state"]),
        "address": shown["address"],
        "plugin": f"{shown['plugin']}{served}",
        "log": shown["log"],
    }
    print_fields(fields)
    if shown["loaded"]:
        click.echo()
        print_models("LOADED", shown["loaded"], "MEMORY", "VRAM", "IDLE")
    elif shown["running"]:
        click.echo("\nno models in memory")
    if shown["available"]:
        click.echo()
        print_models("AVAILABLE", shown["available"], "SIZE", "CONTEXT", "CAPABILITIES")
    elif shown["available"] is not None:
        click.echo(advised("\nno models found. Pull one: engine-plugin models pull MODEL"))
