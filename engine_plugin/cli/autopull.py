"""`--auto-pull`: pulls a missing model before the call and shows the progress."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.cli.lookup import default_model, is_model, present
from engine_plugin.cli.output import say
from engine_plugin.cli.plugins import chosen_manifest
from engine_plugin.cli.progress import show_pull
from engine_plugin.errors import UnsupportedError
from engine_plugin.models.names import is_cloud_name

if TYPE_CHECKING:
    from engine_plugin.cli.context import Options
    from engine_plugin.host import PluginClient

__all__ = ["model_to_call"]


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
