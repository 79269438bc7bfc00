"""`engine-plugin models use`: makes a model the user's default for its services."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from engine_plugin import catalogue
from engine_plugin.cli.lookup import entry_of
from engine_plugin.cli.names import model_names, service_names
from engine_plugin.cli.options import Command
from engine_plugin.cli.output import report
from engine_plugin.cli.plugins import chosen_manifest
from engine_plugin.cli.session import plugin
from engine_plugin.errors import PreconditionError
from engine_plugin.models.defaults import DefaultModels
from engine_plugin.models.info import KIND_OF_SERVICE, can_serve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.cli.context import Options
    from engine_plugin.host import ModelEntry
    from engine_plugin.manifest import Manifest

__all__ = ["use"]


@click.command(cls=Command)
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
        said = f"restored the default model of plugin.yaml for {', '.join(chosen)}"
    else:
        model, chosen = await _fitting(options, manifest, name, chosen)
        said = f"{model} is now the default model for {', '.join(chosen)}"
    await asyncio.to_thread(defaults.write, dict.fromkeys(chosen, model))
    report(options, {"model": model, "services": chosen, "file": str(defaults.path)}, said)


async def _fitting(
    options: Options, manifest: Manifest, name: str, services: tuple[str, ...]
) -> tuple[str, tuple[str, ...]]:
    """Return the model's listed name and the services for which it becomes the default."""
    async with plugin(options) as client:
        entry = await entry_of(client, name)
    services = services or _services_for(entry, manifest)
    _refuse_other_kinds(entry, services)
    return entry["name"], services


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
