"""Shared by all commands: --plugin, --json and -v, and how a command runs."""

from __future__ import annotations

import asyncio
import signal
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from engine_plugin import PLUGIN_DIR
from engine_plugin.cli.context import Options
from engine_plugin.cli.plugins import packaged_plugin, packaged_plugins
from engine_plugin.waiting import handle_signal

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from click.shell_completion import CompletionItem

__all__ = ["global_options", "run", "runs"]

F = TypeVar("F", bound="Callable[..., Any]")


class _PluginPlace(click.Path):
    """A plugin's directory, or the name of a bundled plugin."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            if ctx is not None:
                ctx.ensure_object(Options).named = value
            if not Path(value).exists():
                if place := packaged_plugin(value):
                    return place
                names = ", ".join(packaged_plugins())
                self.fail(f"directory {value!r} does not exist; the bundled plugins are {names}", param, ctx)
        return super().convert(value, param, ctx)


def global_options(command: F) -> F:
    """Add --plugin, --json and -v to a command; they may be given before or after its name."""

    def keep(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
        def callback(ctx: click.Context, _parameter: click.Parameter, value: Any) -> None:
            if value:
                setattr(ctx.ensure_object(Options), name, value)

        return callback

    for decorate in (
        click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=keep("verbose"), help="Log more."),
        click.option("--json", is_flag=True, expose_value=False, callback=keep("json"), help="Print JSON."),
        click.option(
            "--plugin",
            type=_PluginPlace(exists=True, file_okay=False, path_type=Path),
            metavar="DIR",
            expose_value=False,
            callback=keep("plugin"),
            shell_complete=_plugin_names,
            help=f"The plugin's directory, or name. [default: {PLUGIN_DIR}, the nearest plugin.yaml, the bundled]",
        ),
    ):
        command = decorate(command)
    return command


def _plugin_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    from engine_plugin.cli.names import plugin_names  # imported only for completion

    return plugin_names(ctx, parameter, incomplete)


def runs(command: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Turn a coroutine function, whose first argument is Options, into a function for click."""

    @click.pass_obj
    @wraps(command)
    def start(options: Options, /, *arguments: Any, **named: Any) -> None:
        run(options, command(options, *arguments, **named))

    return start


def run(options: Options, work: Coroutine[Any, Any, None]) -> None:
    """Run a command's coroutine. Ctrl-C cancels it; its resources are released before the command exits."""
    from engine_plugin.cli.logs import set_up_logging

    set_up_logging("DEBUG" if options.verbose else "")

    async def interruptible() -> None:
        handle_signal(signal.SIGINT, signal.getsignal(signal.SIGINT))  # wakes the loop for asyncio's handler
        await work

    asyncio.run(interruptible())
