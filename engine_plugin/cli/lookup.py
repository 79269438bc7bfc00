"""Which model a command means: a name among those here, or a service's default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.errors import EnginePluginError, NotFoundError

if TYPE_CHECKING:
    from engine_plugin.host import ModelEntry, PluginClient

__all__ = ["default_model", "entry_of", "is_model", "missing"]

_LATEST = ":latest"


def is_model(entry: ModelEntry, wanted: str) -> bool:
    """Whether a model of a list is the wanted one: by its name, with or without the tag that Ollama adds, or by a
    reference."""
    name = entry.get("name", "").removesuffix(_LATEST)
    return name == wanted.removesuffix(_LATEST) or wanted in entry.get("references", ())


async def default_model(client: PluginClient, service: str) -> str:
    """The model that answers a call of `service` which names none, "" when the engine chooses one at the call."""
    for declared in (await client.get_manifest()).get("services", ()):
        if declared.get("service_name") == service:
            return str(declared.get("default_model") or "")
    return ""


async def entry_of(client: PluginClient, name: str) -> ModelEntry:
    """A model's entry in ListModels, by its name or a reference. Raises NotFoundError, with near names and how to
    have it."""
    entries = await client.list_models()
    # A name goes before a reference of the same text, as it does in the plugin.
    for entry in sorted(entries, key=lambda entry: entry.get("name") != name):
        if is_model(entry, name):
            return entry
    raise await missing(client, name, [entry.get("name", "") for entry in entries])


async def missing(client: PluginClient, name: str, here: list[str]) -> NotFoundError:
    """The plugin's own words for a model that is not `here`: only its engine knows how one gets here.

    It is asked for what does nothing to a model that is not there; not every engine has the first.
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
