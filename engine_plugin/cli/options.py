"""Shared by all commands: --plugin, --json and -v, and how a command runs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from engine_plugin import PLUGIN_DIR
from engine_plugin.cli.context import Options
from engine_plugin.cli.logs import set_up_logging
from engine_plugin.cli.names import model_names, plugin_names
from engine_plugin.cli.plugins import bundled_plugins
from engine_plugin.waiting import handle_signal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Command", "Group", "model_options"]

F = TypeVar("F", bound="Callable[..., Any]")


class _PluginPlace(click.Path):
    """A plugin's directory, or the name of a bundled plugin."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            if ctx is not None:
                ctx.ensure_object(Options).named = value
            if not Path(value).exists():
                bundled = bundled_plugins()
                if value in bundled:
                    return bundled[value]
                names = ", ".join(bundled)
                self.fail(f"directory {value!r} does not exist; the bundled plugins are {names}", param, ctx)
        return super().convert(value, param, ctx)


def _keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value and parameter.name:
        setattr(ctx.ensure_object(Options), parameter.name, value)


_GLOBAL_OPTIONS = (
    click.Option(
        ["--plugin"],
        type=_PluginPlace(exists=True, file_okay=False, path_type=Path),
        metavar="DIR",
        expose_value=False,
        callback=_keep,
        shell_complete=plugin_names,
        help=f"The plugin's directory, or name. [default: {PLUGIN_DIR}, the nearest plugin.yaml, the bundled]",
    ),
    click.Option(["--json"], is_flag=True, expose_value=False, callback=_keep, help="Print JSON."),
    click.Option(["-v", "--verbose"], is_flag=True, expose_value=False, callback=_keep, help="Log more."),
)


class _WithGlobalOptions(click.Command):
    """Base of commands and groups: the global options may be given before or after a command's name."""

    def __init__(self, name: str | None, *, params: list[click.Parameter], **settings: Any) -> None:
        super().__init__(name, params=[*params, *_GLOBAL_OPTIONS], **settings)


class Command(_WithGlobalOptions):
    """A command with the global options. Its callback takes `Options` first, and may be a coroutine function.

    Ctrl-C cancels the coroutine; its resources are released before the command exits.
    """

    def invoke(self, ctx: click.Context) -> None:
        """Run the command. Raises what its callback raises."""
        ctx.invoke(self._start, ctx.obj, **ctx.params)

    def _start(self, options: Options, **parameters: Any) -> None:
        assert self.callback is not None, "every command has a callback"  # noqa: S101
        work = self.callback(options, **parameters)
        if isinstance(work, Coroutine):
            set_up_logging("DEBUG" if options.verbose else "")
            asyncio.run(_interruptible(work))


async def _interruptible(work: Awaitable[None]) -> None:
    handle_signal(signal.SIGINT, signal.getsignal(signal.SIGINT))  # wakes the loop for asyncio's handler
    await work


class Group(_WithGlobalOptions, click.Group):
    """A group of commands with the global options."""

    command_class = Command


def model_options(command: F) -> F:
    """Add `--model` and `--auto-pull` to a command, which passes both to `session.serving`."""
    command = click.option("--auto-pull", is_flag=True, help="Pull the model first if it is missing.")(command)
    return click.option(
        "--model", shell_complete=model_names, help="Model name. [default: the service's default model]"
    )(command)
