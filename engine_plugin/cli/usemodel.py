"""`engine-plugin models use`: a model becomes the default of its services, in the plugin's manifest."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine_plugin import catalogue
from engine_plugin.cli.names import model_names, service_names
from engine_plugin.cli.options import Options, chosen_manifest, global_options, runs
from engine_plugin.cli.output import print_json, print_line, say
from engine_plugin.cli.wanted import entry_of
from engine_plugin.errors import PreconditionError
from engine_plugin.models.info import KIND_OF_SERVICE, can_serve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.host import ModelEntry
    from engine_plugin.manifest import Manifest

__all__ = ["use"]


@click.command()
@click.argument("name", shell_complete=model_names)
@click.option(
    "--service",
    "services",
    multiple=True,
    shell_complete=service_names,
    metavar="SERVICE",
    help="Only for this service; may be given again. [default: each that needs such a model]",
)
@global_options
@runs
async def use(options: Options, name: str, services: tuple[str, ...]) -> None:
    """Make a model the default of its services: set default_model in plugin.yaml and change nothing else there."""
    from engine_plugin.cli.rendezvous import Rendezvous
    from engine_plugin.cli.session import plugin
    from engine_plugin.manifest.edit import set_default_models

    manifest = chosen_manifest(options)
    for service in services:
        manifest.service(service)  # a misspelt one is said before a plugin is launched
    async with plugin(options) as client:
        entry = await entry_of(client, name)
    model = entry["name"]
    chosen = tuple(dict.fromkeys(services)) or _services_for(entry, manifest)
    _refuse_other_kinds(entry, chosen)
    changed = await asyncio.to_thread(set_default_models, manifest.path, dict.fromkeys(chosen, model))
    restart = bool(changed) and Rendezvous(manifest).find() is not None
    if options.json:
        print_json(
            {"model": model, "file": str(manifest.path), "services": chosen, "changed": changed, "restart": restart}
        )
    elif changed:
        print_line(f"{model} is now the default model for {', '.join(changed)} ({manifest.path})")
    else:
        print_line(f"{model} was the default model for {', '.join(chosen)} already ({manifest.path})")
    if changed:
        _say_when(manifest, restart)


def _services_for(entry: ModelEntry, manifest: Manifest) -> tuple[str, ...]:
    """The declared services that need a model of that kind. Raises PreconditionError when there is none."""
    name, kind = entry["name"], entry.get("kind", "")
    if not kind:
        raise PreconditionError(
            f"nobody knows what {name} is for. Say it: --service, with one of {', '.join(manifest.services)}"
        )
    found = tuple(service for service in manifest.services if KIND_OF_SERVICE.get(service) == kind)
    if not found:
        raise PreconditionError(
            f"{name} is a model for {kind}, and {manifest.path} declares no service that needs one; "
            f"it has: {', '.join(manifest.services)}"
        )
    return found


def _refuse_other_kinds(entry: ModelEntry, services: Sequence[str]) -> None:
    kind = entry.get("kind", "")
    can = entry.get("details", {}).get("capabilities", ())
    for service in services:
        if kind and not can_serve(service, kind, can):
            wanted = KIND_OF_SERVICE.get(service, service)
            raise catalogue.MODEL_KIND.error(model=entry["name"], kind=kind, service=service, wanted=wanted)


def _say_when(manifest: Manifest, restart: bool) -> None:
    import engine_plugin

    if restart:
        restart_it = "engine-plugin engine stop && engine-plugin engine start"
        say(f"the running server keeps to the old one until a restart: {restart_it}")
    if Path(engine_plugin.__file__).parent in manifest.path.parents:
        say("this file came with the package, and an upgrade replaces it: keep a copy of your own (--plugin DIR)")
