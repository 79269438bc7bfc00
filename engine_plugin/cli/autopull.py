"""`--auto-pull`: a model that a call needs and that is not here is pulled before the call, with a bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from engine_plugin.cli.lookup import default_model, is_model
from engine_plugin.cli.output import say
from engine_plugin.cli.plugins import chosen_manifest
from engine_plugin.cli.progress import show_pull
from engine_plugin.errors import UnsupportedError
from engine_plugin.models.names import is_cloud_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine_plugin.cli.context import Options
    from engine_plugin.host import PluginClient

__all__ = ["auto_pull_option", "model_to_call"]

F = TypeVar("F", bound="Callable[..., Any]")


def auto_pull_option(command: F) -> F:
    """Give a click command `--auto-pull`, which it takes as `auto_pull: bool` and hands to `model_to_call`."""
    return click.option("--auto-pull", is_flag=True, help="Pull the model first when it is not here.")(command)


async def model_to_call(
    client: PluginClient, options: Options, service: str, model: str | None, *, auto_pull: bool
) -> str | None:
    """The model that a request of `service` should name; None to leave it to the plugin, as it was given.

    Called by commands, with the engine running, before their request. With `auto_pull`, or when plugin.yaml says so,
    the model (else the service's default) is looked for and, when it is not here, pulled; progress goes to standard
    error. An engine that cannot pull is left to say itself what it has not. Raises what a pull raises.
    """
    if not (auto_pull or chosen_manifest(options).auto_pull):
        return model
    wanted = model or await default_model(client, service)
    if not wanted or is_cloud_name(wanted):  # a name in the cloud is no file that a pull could bring
        return model
    if any(is_model(entry, wanted) for entry in await client.list_models()):
        return model
    say(f"{wanted} is not here: pulling it")
    try:
        pulled = await show_pull(client, wanted)
    except UnsupportedError as error:
        say(str(error))
        return model
    return model if is_model({"name": pulled}, wanted) else pulled
