"""Names for shell completion: models, services, plugins. Errors and timeouts give an empty list."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from engine_plugin.cli.context import Options
from engine_plugin.cli.logs import set_up_logging
from engine_plugin.cli.plugins import bundled_plugins, chosen_manifest
from engine_plugin.errors import EnginePluginError

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

__all__ = ["PATIENCE_VARIABLE", "model_names", "plugin_names", "service_names"]

PATIENCE_VARIABLE = "ENGINE_PLUGIN_COMPLETION_TIMEOUT"
"""The variable with the timeout for model names, in seconds; the default is one second."""

_PATIENCE = 1.0


def model_names(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the model names, from the running server or else from a plugin launched for this."""
    set_up_logging()
    try:
        names = asyncio.run(_models(_options(ctx)))
    except (EnginePluginError, OSError):
        return []
    return [name for name in names if name.startswith(incomplete)]


async def _models(options: Options) -> list[str]:
    from engine_plugin.cli.session import plugin

    async with asyncio.timeout(_patience()), plugin(options) as client:
        return sorted(entry.get("name", "") for entry in await client.list_models())


def _patience() -> float:
    try:
        return float(os.environ[PATIENCE_VARIABLE])
    except (KeyError, ValueError):
        return _PATIENCE


def service_names(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the services that the chosen plugin declares."""
    try:
        services = chosen_manifest(_options(ctx)).services
    except (EnginePluginError, OSError):
        return []
    return [name for name in services if name.startswith(incomplete)]


def plugin_names(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Return the bundled plugins; the shell completes directories."""
    from click.shell_completion import CompletionItem

    names = [CompletionItem(name) for name in bundled_plugins() if name.startswith(incomplete)]
    return names or [CompletionItem(incomplete, type="dir")]


def _options(ctx: click.Context) -> Options:
    return ctx.find_object(Options) or Options()
