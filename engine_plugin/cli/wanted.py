"""Which of the models here a name on the command line means."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine_plugin.host import ModelEntry, PluginClient

__all__ = ["entry_of", "is_model"]

_LATEST = ":latest"


def is_model(listed: str, wanted: str) -> bool:
    """Whether a model that a list names is the wanted one: the same name, or without the tag that Ollama adds."""
    return listed.removesuffix(_LATEST) == wanted.removesuffix(_LATEST)


async def entry_of(client: PluginClient, name: str) -> ModelEntry:
    """A model's entry in ListModels. Raises ModelNotFoundError, with near names and how to pull it."""
    from engine_plugin import catalogue

    entries = await client.list_models()
    for entry in entries:
        if is_model(entry.get("name", ""), name):
            return entry
    here = [entry.get("name", "") for entry in entries]
    raise catalogue.model_missing(name, near=catalogue.near_names(name, here), here=here, pull=name)
