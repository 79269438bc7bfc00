"""`engine-plugin models`: list, show, pull, rm, ps, load, unload, copy, use."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from engine_plugin import catalogue
from engine_plugin.cli.cells import cells_of, print_models
from engine_plugin.cli.lookup import entry_of, is_model, present
from engine_plugin.cli.names import model_names, service_names
from engine_plugin.cli.options import Group
from engine_plugin.cli.output import print_fields, print_json, print_line, report, say
from engine_plugin.cli.plugins import chosen_manifest
from engine_plugin.cli.progress import show_pull
from engine_plugin.cli.session import plugin, running_plugin
from engine_plugin.errors import EnginePluginError, NotFoundError, PreconditionError
from engine_plugin.models.defaults import DefaultModels
from engine_plugin.models.info import KIND_OF_SERVICE, can_serve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.cli.context import Options
    from engine_plugin.host import LoadedModel, ModelEntry, PluginClient, PullOptions
    from engine_plugin.manifest import Manifest

__all__ = ["PASSWORD_VARIABLE", "models"]

PASSWORD_VARIABLE = "ENGINE_PLUGIN_PULL_PASSWORD"  # noqa: S105 - the name of a variable, not a password

_LISTED = ("KIND", "SIZE", "CONTEXT", "CAPABILITIES", "QUANT", "MODIFIED")
_RUNNING = ("KIND", "MEMORY", "VRAM", "CONTEXT", "IDLE")

_NONE_HERE = "no models found. Pull one: engine-plugin models pull MODEL"
_NONE_LOADED = "no models in memory"


@click.group(cls=Group)
def models() -> None:
    """Manage models: list, show, pull, rm, ps, load, unload, copy, use."""


@models.command("list")
async def list_(options: Options) -> None:
    """List the models on this machine."""
    async with plugin(options) as client:
        _print_entries(options, await client.list_models(), _LISTED, _NONE_HERE)


@models.command()
@click.argument("name", shell_complete=model_names)
async def show(options: Options, name: str) -> None:
    """Show the details of a model."""
    async with plugin(options) as client:
        entry = await entry_of(client, name)
        running = await client.running_models()
        declared = (await client.get_manifest())["services"]
    loaded = next((one.get("loaded", {}) for one in running if one.get("name") == entry["name"]), None)
    services = [one["service_name"] for one in declared if is_model(entry, one["default_model"])]
    if options.json:
        print_json({**entry, "running": loaded is not None, "loaded": loaded or {}, "default_for": services})
        return
    print_fields(_facts(entry, loaded, services), width=15)


@models.command()
async def ps(options: Options) -> None:
    """List the models in memory."""
    async with running_plugin(options) as client:
        _print_entries(options, await client.running_models(), _RUNNING, _NONE_LOADED)


@models.command()
@click.argument("name", shell_complete=model_names)
async def load(options: Options, name: str) -> None:
    """Load a model into memory."""
    async with running_plugin(options) as client:
        await client.load_model(name)
    _done(options, "loaded", [name])


@models.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=model_names)
async def unload(options: Options, names: tuple[str, ...]) -> None:
    """Unload models from memory, after their running requests."""
    async with running_plugin(options) as client:
        await client.unload_model(*names)
    _done(options, "unloaded", names)


@models.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=model_names)
@click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")
async def rm(options: Options, names: tuple[str, ...], yes: bool) -> None:
    """Delete models and unfinished pulls. Asks for confirmation at a terminal."""
    async with plugin(options) as client:
        asked = [] if yes or not sys.stdin.isatty() else await present(client, names)
        if asked and not await _confirmed(f"Delete {', '.join(asked)}?"):
            say("nothing deleted")
            click.get_current_context().exit(1)
        for name in names:
            await client.delete_model(name)
            _done(options, "deleted", [name])


async def _confirmed(question: str) -> bool:
    """Ask on standard error. Ctrl-C and the end of input count as no."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    session = PromptSession[str](output=create_output(sys.stderr))
    try:
        answer = await session.prompt_async(f"{question} [y/N] ", handle_sigint=False)
    except (EOFError, KeyboardInterrupt):  # the prompt reads Ctrl-C as a key
        return False
    return answer.strip().lower() in {"y", "yes"}


def _from_here(source: str) -> str:
    """Return the absolute path of a file or folder, as the plugin runs in another directory; other sources as given.

    An existing file is a path, and so is a missing GGUF file of an existing folder. A folder must be written as a
    path, `./name` or `name/`, because a model may have the folder's name.
    """
    if "://" in source:
        return source
    local = Path(source).expanduser()
    begins_as_path = source.startswith(("./", "../", "~", ".\\", "..\\")) or source in (".", "..")
    is_file = local.is_file() or (local.suffix.lower() == ".gguf" and local.parent.is_dir())
    if begins_as_path or source.endswith(("/", os.sep)) or local.is_absolute() or is_file:
        return os.path.abspath(local)  # noqa: PTH100  # pathlib keeps `..`, which would show in messages
    return source


@models.command()
@click.argument("model")
@click.option("--name", help="Name for the model; MODEL is then its source.")
@click.option("--sha256", help="Expected SHA-256 of the file, in hexadecimal.")
@click.option("--type", "model_type", metavar="SERVICE", help="Kind of the model: chat, embed, rerank…")
@click.option("--insecure", is_flag=True, help="Allow unencrypted connections and unverified certificates.")
@click.option("--username", help=f"User name at the source; the password is read from {PASSWORD_VARIABLE}.")
async def pull(options: Options, model: str, name: str | None, **fields: Any) -> None:
    """Pull a model by name, URL or path. An interrupted pull is resumed by the same command."""
    source = _from_here(model)
    fields |= {"source": source if name else "", "password": os.environ.get(PASSWORD_VARIABLE)}
    wanted = cast("PullOptions", {field: value for field, value in fields.items() if value})
    try:
        async with plugin(options) as client:
            pulled = await show_pull(client, name or source, as_json=options.json, **wanted)
            kind = "" if options.json else await _kind_of(client, pulled)
    except NotFoundError:
        if source == model and os.path.isdir(model):  # noqa: ASYNC240, PTH112  # after all work has ended
            say(f"To pull the folder {model} in this directory: engine-plugin models pull ./{model}")
        raise
    if not options.json:
        print_line(f"pulled {pulled}")
        if command := _TRIED_BY.get(kind):
            say(f"Try it: engine-plugin {command.format(shlex.quote(pulled))}")


_TRIED_BY = {
    "chat": "chat --model {}",
    "embed": "embed --model {} TEXT",
    "rerank": "rerank --model {} QUERY DOCUMENT DOCUMENT",
    "text-to-image": "image --model {} PROMPT -o FILE.png",
    "speech-to-text": "transcribe --model {} FILE",
    "text-to-speech": "speak --model {} TEXT -o FILE.wav",
}
"""The command that calls a model of each kind; {} is its name."""


async def _kind_of(client: PluginClient, name: str) -> str:
    """Return the kind of a pulled model, "" if the engine does not know it."""
    try:
        return (await entry_of(client, name)).get("kind", "")
    except EnginePluginError:
        return ""


@models.command()
@click.argument("old", shell_complete=model_names)
@click.argument("new")
async def copy(options: Options, old: str, new: str) -> None:
    """Copy model OLD to the name NEW. The copy takes no disk space if the engine can share the file."""
    async with plugin(options) as client:
        copied = await show_pull(client, new, as_json=options.json, source=f"model:{old}")
    if not options.json:
        print_line(f"copied {old} to {copied}")


@models.command()
@click.argument("name", required=False, shell_complete=model_names)
@click.option(
    "--service",
    "services",
    multiple=True,
    shell_complete=service_names,
    metavar="SERVICE",
    help="Only for this service; may be given several times. [default: all services for this kind of model]",
)
@click.option("--reset", is_flag=True, help="Restore the default models of plugin.yaml.")
async def use(options: Options, name: str | None, services: tuple[str, ...], reset: bool) -> None:
    """Make a model the default for its services, from the next call on.

    The choice is stored in the data directory; plugin.yaml is not changed.
    """
    if (name is None) is not reset:
        raise click.UsageError("give either a model or --reset")
    manifest = chosen_manifest(options)
    for service in services:
        manifest.service(service)  # fail on an unknown service before a plugin is launched
    defaults = DefaultModels(manifest.data_dir, manifest.engine_name)
    chosen = tuple(dict.fromkeys(services))
    if name is None:
        model, chosen = "", chosen or tuple(manifest.services)
        summary = f"restored the default model of plugin.yaml for {', '.join(chosen)}"
    else:
        model, chosen = await _fitting(options, manifest, name, chosen)
        summary = f"{model} is now the default model for {', '.join(chosen)}"
    await asyncio.to_thread(defaults.write, dict.fromkeys(chosen, model))
    report(options, {"model": model, "services": chosen, "file": str(defaults.path)}, summary)


async def _fitting(
    options: Options, manifest: Manifest, name: str, services: tuple[str, ...]
) -> tuple[str, tuple[str, ...]]:
    """Return the model's listed name and the services for which it becomes the default."""
    async with plugin(options) as client:
        entry = await entry_of(client, name)
    _refuse_other_kinds(entry, services)
    return entry["name"], services or _services_for(entry, manifest)


def _services_for(entry: ModelEntry, manifest: Manifest) -> tuple[str, ...]:
    """Return the declared services for the model's kind. Raises PreconditionError if there are none."""
    name, kind = entry["name"], entry.get("kind", "")
    if not kind:
        raise PreconditionError(
            f"the kind of {name} is unknown. Name a service: --service with one of {', '.join(manifest.services)}"
        )
    found = tuple(service for service in manifest.services if KIND_OF_SERVICE.get(service) == kind)
    if not found:
        raise PreconditionError(
            f"{name} is a model for {kind}, and {manifest.path} declares no such service; "
            f"it declares: {', '.join(manifest.services)}"
        )
    return found


def _refuse_other_kinds(entry: ModelEntry, services: Sequence[str]) -> None:
    kind = entry.get("kind", "")
    can = entry.get("details", {}).get("capabilities", ())
    for service in services:
        if kind and not can_serve(service, kind, can):
            wanted = KIND_OF_SERVICE.get(service, service)
            raise catalogue.MODEL_KIND_MISMATCH.error(model=entry["name"], kind=kind, service=service, wanted=wanted)


def _print_entries(options: Options, entries: Sequence[ModelEntry], heads: Sequence[str], none: str) -> None:
    if options.json:
        print_json(entries)
    elif not entries:
        say(none)
    else:
        print_models("NAME", entries, *heads)


def _facts(entry: ModelEntry, loaded: LoadedModel | None, services: Sequence[str]) -> dict[str, str]:
    """Return the fields of `show`, "" for an unknown one; `loaded` is None for a model that is not in memory."""
    details, cells = entry.get("details", {}), cells_of(entry)
    source = details.get("context_source", "")
    running = cells_of({"loaded": loaded or {}})
    memory = ", ".join(filter(None, (running["MEMORY"], running["VRAM"], running["IDLE"])))
    return {
        "name": cells["NAME"],
        "kind": cells["KIND"],
        "size": cells["SIZE"],
        "capabilities": ", ".join(details.get("capabilities", ())),
        "context": f"{cells['CONTEXT']} tokens ({source})" if source else "",
        "format": details.get("format", ""),
        "family": ", ".join(details.get("families", ())) or details.get("family", ""),
        "parameters": details.get("parameter_size", ""),
        "quantization": cells["QUANT"],
        "digest": entry.get("digest", ""),
        "modified": entry.get("modified_at", ""),
        "origin": "a sample that comes with the plugin" if entry.get("bundled") else "",
        "in memory": (memory or "yes") if loaded is not None else "no",
        "default for": ", ".join(services),
    }


def _done(options: Options, what: str, names: Sequence[str]) -> None:
    report(options, {what: list(names)}, f"{what} {', '.join(names)}")
