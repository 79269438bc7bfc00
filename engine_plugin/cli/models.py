"""`engine-plugin models`: list, show, pull, rm, ps, load, unload, copy, use."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine_plugin.cli import cells
from engine_plugin.cli.names import model_names
from engine_plugin.cli.options import Options, chosen_manifest, global_options, run, runs
from engine_plugin.cli.output import human_size, print_fields, print_json, print_line, print_table, say
from engine_plugin.cli.usemodel import use
from engine_plugin.cli.wanted import entry_of, is_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from engine_plugin.host import LoadedModel, ModelEntry, PullOptions

__all__ = ["PASSWORD_VARIABLE", "models"]

PASSWORD_VARIABLE = "ENGINE_PLUGIN_PULL_PASSWORD"  # noqa: S105 - the name of a variable, not a password

_LISTED = ("NAME", "KIND", "SIZE", "CONTEXT", "CAPABILITIES", "QUANT", "MODIFIED")
_RUNNING = ("NAME", "KIND", "MEMORY", "VRAM", "CONTEXT", "IDLE")

_NONE_HERE = "no model is here; engine-plugin models pull MODEL brings one"
_NONE_LOADED = "no model is in memory"


@click.group()
@global_options
def models() -> None:
    """The models: list, show, pull, rm, ps, load, unload, copy, use."""


@models.command("list")
@global_options
@runs
async def list_(options: Options) -> None:
    """List the models on this machine."""
    from engine_plugin.cli.session import plugin

    async with plugin(options) as client:
        _print_entries(options, await client.list_models(), _LISTED, _listed_row, _NONE_HERE)


@models.command()
@click.argument("name", shell_complete=model_names)
@global_options
@runs
async def show(options: Options, name: str) -> None:
    """Show all that is known about a model."""
    from engine_plugin.cli.session import plugin

    async with plugin(options) as client:
        entry = await entry_of(client, name)
        running = await client.running_models()
    loaded = next((one.get("loaded", {}) for one in running if one.get("name") == entry["name"]), None)
    services = [
        spec.service_name
        for spec in chosen_manifest(options).services.values()
        if spec.default_model and is_model(entry["name"], spec.default_model)
    ]
    if options.json:
        print_json({**entry, "running": loaded is not None, "loaded": loaded or {}, "default_for": services})
        return
    print_fields(_facts(entry, loaded, services))


@models.command()
@global_options
@runs
async def ps(options: Options) -> None:
    """List the models in memory."""
    from engine_plugin.cli.session import running_plugin

    async with running_plugin(options) as client:
        _print_entries(options, await client.running_models(), _RUNNING, _running_row, _NONE_LOADED)


@models.command()
@click.argument("name", shell_complete=model_names)
@global_options
@runs
async def load(options: Options, name: str) -> None:
    """Bring a model into memory."""
    from engine_plugin.cli.session import running_plugin

    async with running_plugin(options) as client:
        await client.load_model(name)
    _done(options, "loaded", [name])


@models.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=model_names)
@global_options
@runs
async def unload(options: Options, names: tuple[str, ...]) -> None:
    """Take models out of memory, after their running requests."""
    from engine_plugin.cli.session import running_plugin

    async with running_plugin(options) as client:
        await client.unload_model(*names)
    _done(options, "unloaded", names)


@models.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=model_names)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@global_options
@click.pass_obj
def rm(options: Options, names: tuple[str, ...], yes: bool) -> None:
    """Delete models from this machine. Asks first when at a terminal."""
    # Asked before there is an event loop, which would take the first Ctrl-C for itself.
    if not yes and sys.stdin.isatty() and not click.confirm(f"Delete {', '.join(names)}?", err=True):
        say("nothing was deleted")
        click.get_current_context().exit(1)
    run(options, _rm(options, names))


async def _rm(options: Options, names: tuple[str, ...]) -> None:
    from engine_plugin.cli.session import plugin

    async with plugin(options) as client:
        for name in names:
            await client.delete_model(name)
            _done(options, "deleted", [name])


def _from_here(source: str) -> str:
    """The absolute path of a file, since the plugin may run in another directory; other sources as they are."""
    local = Path(source)
    return str(local.absolute()) if local.is_file() else source


@models.command()
@click.argument("model")
@click.option("--name", help="Call the model this, and take MODEL as its source.")
@click.option("--sha256", help="The file's SHA-256 in hexadecimal; another content is refused.")
@click.option("--type", "model_type", metavar="SERVICE", help="What the model is for: chat, embed, rerank…")
@click.option("--insecure", is_flag=True, help="Allow an unencrypted or unverified source.")
@click.option("--username", help=f"For a source that asks; the password comes from {PASSWORD_VARIABLE}.")
@global_options
@runs
async def pull(
    options: Options,
    model: str,
    name: str | None,
    sha256: str | None,
    model_type: str | None,
    insecure: bool,
    username: str | None,
) -> None:
    """Fetch a model by name, URL or path. Interrupted, it keeps what has arrived and resumes the next time."""
    from engine_plugin.cli.progress import show_pull
    from engine_plugin.cli.session import plugin

    model = _from_here(model)
    wanted: PullOptions = {}
    if name:
        wanted["source"] = model
    if sha256:
        wanted["sha256"] = sha256
    if model_type:
        wanted["model_type"] = model_type
    if insecure:
        wanted["insecure"] = True
    if username:
        wanted["username"] = username
    if password := os.environ.get(PASSWORD_VARIABLE):
        wanted["password"] = password
    async with plugin(options) as client:
        pulled = await show_pull(client, name or model, as_json=options.json, **wanted)
    if not options.json:
        print_line(f"pulled {pulled}")


@models.command()
@click.argument("old", shell_complete=model_names)
@click.argument("new")
@global_options
@runs
async def copy(options: Options, old: str, new: str) -> None:
    """Give a model that is here a second name, NEW. It takes no further room where the engine can share the file."""
    from engine_plugin.cli.progress import show_pull
    from engine_plugin.cli.session import plugin

    async with plugin(options) as client:
        copied = await show_pull(client, new, as_json=options.json, source=f"model:{old}")
    if not options.json:
        print_line(f"copied {old} to {copied}")


models.add_command(use)


def _print_entries(
    options: Options,
    entries: Sequence[ModelEntry],
    heads: Sequence[str],
    row: Callable[[ModelEntry], Sequence[str]],
    none: str,
) -> None:
    if options.json:
        print_json(entries)
    elif not entries:
        say(none)
    else:
        print_table(heads, [row(entry) for entry in entries])


def _listed_row(entry: ModelEntry) -> Sequence[str]:
    details = entry.get("details", {})
    return (
        entry.get("name", ""),
        entry.get("kind", ""),
        human_size(entry.get("size", 0)),
        cells.context(details),
        cells.can_do(entry),
        details.get("quantization_level", ""),
        entry.get("modified_at", "")[:10],
    )


def _running_row(entry: ModelEntry) -> Sequence[str]:
    loaded = entry.get("loaded", {})
    return (
        entry.get("name", ""),
        entry.get("kind", ""),
        cells.memory(loaded),
        cells.vram(loaded),
        cells.context(loaded),
        cells.idle(loaded),
    )


def _facts(entry: ModelEntry, loaded: LoadedModel | None, services: Sequence[str]) -> dict[str, str]:
    """What `show` says of a model; loaded is None when it is not in memory."""
    details = entry.get("details", {})
    source = details.get("context_source", "")
    memory = ", ".join(filter(None, (cells.memory(loaded), cells.vram(loaded), cells.idle(loaded)))) if loaded else ""
    facts = {
        "name": entry.get("name", ""),
        "kind": entry.get("kind", ""),
        "size": human_size(entry.get("size", 0)),
        "capabilities": ", ".join(details.get("capabilities", ())),
        "context": f"{cells.context(details)} tokens" + (f" ({source})" if source else "") if source else "",
        "format": details.get("format", ""),
        "family": ", ".join(details.get("families", ())) or details.get("family", ""),
        "parameters": details.get("parameter_size", ""),
        "quantization": details.get("quantization_level", ""),
        "digest": entry.get("digest", ""),
        "modified": entry.get("modified_at", ""),
        "origin": "a sample that comes with the plugin" if entry.get("bundled") else "",
        "in memory": (memory or "yes") if loaded is not None else "no",
        "default for": ", ".join(services),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _done(options: Options, what: str, names: Sequence[str]) -> None:
    if options.json:
        print_json({what: list(names)})
    else:
        print_line(f"{what} {', '.join(names)}")
