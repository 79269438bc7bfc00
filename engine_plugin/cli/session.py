"""The plugin that a command calls: the running server, or a child process for the duration of the command."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from engine_plugin.catalogue import ENGINE_NOT_RUNNING
from engine_plugin.cli.lookup import model_to_call
from engine_plugin.cli.plugins import chosen_manifest
from engine_plugin.cli.terminal import waiting
from engine_plugin.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from engine_plugin.cli.context import Options
    from engine_plugin.host import LogLine, PluginClient

__all__ = ["plugin", "running_plugin", "serving"]

_START_TIMEOUT = 30.0
_QUICK = 10.0


@asynccontextmanager
async def plugin(options: Options, on_log: Callable[[LogLine], None] | None = None) -> AsyncIterator[PluginClient]:
    """Yield the running server's plugin, or launch one that ends with this command."""
    from engine_plugin import PLUGIN_DIR
    from engine_plugin.cli.server_record import ServerRecordStore
    from engine_plugin.host import launch
    from engine_plugin.process.python import own_command, own_environ

    manifest = chosen_manifest(options)
    records = ServerRecordStore(manifest)
    record = records.find()
    if record is not None:
        client = await records.reach(record)
    else:
        client = await launch(
            own_command("engine_plugin.app"),
            name=manifest.provider.name,
            cwd=manifest.plugin_dir,
            env={**own_environ(os.environ), PLUGIN_DIR: str(manifest.plugin_dir)},
            start_timeout=_START_TIMEOUT,
            on_log=on_log,
        )
    async with client:
        yield client


@asynccontextmanager
async def serving(
    options: Options, service: str, model: str | None, *, auto_pull: bool
) -> AsyncIterator[tuple[PluginClient, str | None]]:
    """Yield the plugin with its engine running, and the model that a request should name, from `model_to_call`.

    Raises ServiceNotFoundError for an undeclared service.
    """
    chosen_manifest(options).service(service)
    with waiting("starting the engine") as started:
        async with plugin(options) as client:
            try:
                await client.health_check(timeout=_QUICK)
            except UnavailableError:
                await client.start_engine()
            started()
            yield client, await model_to_call(client, options, service, model, auto_pull=auto_pull)


@asynccontextmanager
async def running_plugin(options: Options) -> AsyncIterator[PluginClient]:
    """Yield a plugin whose engine is running: the running server's, or one with an attached server.

    Raises UnavailableError, with the command that starts the engine, if there is none.
    """
    async with plugin(options) as client:
        # A launched plugin has not started its engine; only an attached server can have models in memory.
        if client.pid is not None:
            try:
                await client.health_check(timeout=_QUICK)
            except UnavailableError as error:
                if error.id != ENGINE_NOT_RUNNING.id:
                    raise  # no attached server answers, and `engine start` cannot start it
                raise UnavailableError(
                    f"{chosen_manifest(options).provider.name} is not running; no models in memory. "
                    "Start it: engine-plugin engine start"
                ) from None
        yield client
