"""Resolves a command's model: a listed name, or a service's default; `--auto-pull` pulls a missing one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.cli.output import say
from engine_plugin.cli.plugins import chosen_manifest
from engine_plugin.cli.progress import show_pull
from engine_plugin.errors import EnginePluginError, NotFoundError, UnsupportedError
from engine_plugin.models.names import is_cloud_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.cli.context import Options
    from engine_plugin.host import ModelEntry, PluginClient

__all__ = ["default_model", "entry_of", "is_model", "missing", "model_to_call", "present"]

_LATEST = ":latest"


def is_model(entry: ModelEntry, wanted: str) -> bool:
    """Return whether a list entry is the wanted model, by its name (with or without `:latest`) or a reference."""
    name = entry.get("name", "").removesuffix(_LATEST)
    return name == wanted.removesuffix(_LATEST) or wanted in entry.get("references", ())


async def present(client: PluginClient, names: Sequence[str]) -> list[str]:
    """Return those of the names that belong to an existing model, as names or references."""
    listed = await client.list_models()
    return [name for name in names if any(is_model(entry, name) for entry in listed)]


async def default_model(client: PluginClient, service: str) -> str:
    """Return the model for calls of `service` that name none, "" if the engine chooses it at the call."""
    for declared in (await client.get_manifest()).get("services", ()):
        if declared.get("service_name") == service:
            return str(declared.get("default_model") or "")
    return ""


async def entry_of(client: PluginClient, name: str) -> ModelEntry:
    """Return a model's entry in ListModels, by its name or a reference.

    Raises NotFoundError with similar names and the command that pulls the model.
    """
    entries = await client.list_models()
    # A name takes precedence over an equal reference, as in the plugin.
    for entry in sorted(entries, key=lambda entry: entry.get("name") != name):
        if is_model(entry, name):
            return entry
    raise await missing(client, name, [entry.get("name", "") for entry in entries])


async def missing(client: PluginClient, name: str, here: list[str]) -> NotFoundError:
    """Return the plugin's own error for a missing model, because only its engine knows how to pull it.

    UnloadModel and LoadModel do nothing for a missing model but raise that error; not every engine has the first.
    """
    from engine_plugin import catalogue

    for asking in (client.unload_model, client.load_model):
        try:
            await asking(name)
        except NotFoundError as error:
            return error
        except EnginePluginError:
            continue
    return catalogue.model_missing(name, near=catalogue.near_names(name, here), here=here)


async def model_to_call(
    client: PluginClient, options: Options, service: str, model: str | None, *, auto_pull: bool
) -> str | None:
    """Return the model that a request of `service` should name; None lets the plugin choose.

    Called with the engine running. With `auto_pull`, or `auto_pull: true` in
    plugin.yaml, a missing model (`model`, else the service's default) is pulled; progress goes to standard error. If
    the engine cannot pull, the call itself reports the missing model. Raises what a pull raises.
    """
    if not (auto_pull or chosen_manifest(options).auto_pull):
        return model
    wanted = model or await default_model(client, service)
    if not wanted or is_cloud_name(wanted):  # cloud models have no files to pull
        return model
    if await present(client, [wanted]):
        return model
    say(f"model {wanted} is missing; pulling it")
    try:
        pulled = await show_pull(client, wanted)
    except UnsupportedError as error:
        say(str(error))
        return model
    return model if is_model({"name": pulled}, wanted) else pulled
