"""`engine-plugin status`: the engine, what is in its memory, and what it could load, on one screen."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from engine_plugin.cli.options import Options, chosen_manifest, global_options, runs
from engine_plugin.cli.output import human_size, print_json, print_table, say
from engine_plugin.errors import EnginePluginError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from engine_plugin.cli.rendezvous import ServerRecord
    from engine_plugin.host import PluginClient

__all__ = ["status"]

_QUICK = 10.0
_MINUTE = 60
_STOPPED = "stopped"

T = TypeVar("T")


@click.command()
@global_options
@runs
async def status(options: Options) -> None:
    """Show the engine (version, state, address), the models in memory, and those that a call may name.

    Without a server it asks a plugin that it launches for the moment.
    """
    from engine_plugin.cli.rendezvous import Rendezvous
    from engine_plugin.cli.session import plugin

    manifest = chosen_manifest(options)
    record = Rendezvous(manifest).find()
    async with plugin(options) as client:
        shown = {"plugin": manifest.provider.name, "engine": manifest.engine_name} | await _found(client, record)
    if options.json:
        print_json(shown)
        return
    _print(shown)
    if shown["state"] == _STOPPED:
        say(f"start it: engine-plugin engine {'start' if shown['installed'] else 'install'}")


async def _found(client: PluginClient, record: ServerRecord | None) -> dict[str, Any]:
    """What the plugin tells; what it cannot tell is left empty, and the state says why."""
    config = await client.get_config(timeout=_QUICK)
    check = await client.check_engine(timeout=_QUICK)
    # An engine that has a program is one of ours; one that has an address only is somebody else's.
    attached = bool(config.get("host")) and not config.get("exec_file")
    try:
        running, state = True, await client.health_check(timeout=_QUICK)
    except UnavailableError as error:
        running, state = False, f"down: {error}" if record or attached else _STOPPED
    return {
        "version": await _or(client.get_version(timeout=_QUICK), ""),
        "software": check.detail,
        "installed": check.installed,
        "server": "attached" if attached else "managed",
        "address": f"{config.get('scheme') or 'http'}://{config.get('host')}" if attached else "",
        "running": running,
        "state": state,
        "plugin_address": record.address if record else "",
        "pid": record.pid if record else None,
        "log": record.log if record else "",
        "loaded": await _or(client.running_models(timeout=_QUICK), []) if running else [],
        "available": await _or(client.list_models(timeout=_QUICK), []),
    }


async def _or(asked: Awaitable[T], otherwise: T) -> T:
    try:
        return await asked
    except EnginePluginError:
        return otherwise


def _print(shown: Mapping[str, Any]) -> None:
    version = shown["version"] or ("" if shown["installed"] else "not installed")
    served = f" at {shown['plugin_address']} (pid {shown['pid']})" if shown["plugin_address"] else ""
    lines = {
        "engine": f"{shown['engine']} {version} ({shown['server']})".replace("  ", " "),
        "state": shown["state"],
        "address": shown["address"],
        "plugin": f"{shown['plugin']}{served}",
        "log": shown["log"],
    }
    for name, value in lines.items():
        if value:
            click.echo(f"{name + ':':<9}{value}")
    click.echo()
    if shown["loaded"]:
        print_table(("LOADED", "MEMORY", "VRAM", "IDLE"), [_loaded_row(entry) for entry in shown["loaded"]])
    else:
        click.echo("no model is in memory")
    click.echo()
    if shown["available"]:
        heads = ("AVAILABLE", "SIZE", "CONTEXT", "CAPABILITIES")
        print_table(heads, [_available_row(entry) for entry in shown["available"]])
    else:
        click.echo("no model is here; engine-plugin models pull MODEL brings one")


def _loaded_row(entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    loaded: Mapping[str, Any] = entry.get("loaded") or {}
    memory, accelerator = loaded.get("memory") or 0, loaded.get("accelerator_memory") or 0
    where = human_size(accelerator) if accelerator else ("CPU" if memory else "")
    return entry.get("name", ""), human_size(memory) if memory else "", where, _idle(loaded)


def _idle(loaded: Mapping[str, Any]) -> str:
    """How long nobody has used it, or how long it stays."""
    if loaded.get("expires_at"):
        try:
            left = (datetime.fromisoformat(loaded["expires_at"]) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return ""
        return f"{_time(left)} left" if left > 0 else "leaving"
    return _time(loaded["idle_s"]) if isinstance(loaded.get("idle_s"), int | float) else ""


def _time(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / _MINUTE)
    return f"{minutes} min" if minutes < 2 * _MINUTE else f"{minutes / _MINUTE:.0f} h"


def _available_row(entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    details: Mapping[str, Any] = entry.get("details") or {}
    context = details.get("context_length") or 0
    capabilities = ", ".join(details.get("capabilities") or [entry.get("kind", "")])
    return entry.get("name", ""), human_size(entry.get("size", 0)), str(context or ""), f"[{capabilities}]"
