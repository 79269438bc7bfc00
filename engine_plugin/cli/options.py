"""What every command shares: --plugin, --json and -v, the plugin they choose, and how a command runs."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from engine_plugin import PLUGIN_DIR
from engine_plugin.errors import ManifestError, NotFoundError
from engine_plugin.waiting import handle_signal

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from click.shell_completion import CompletionItem

    from engine_plugin.manifest import Manifest

__all__ = [
    "COMPLETE",
    "Options",
    "advised",
    "chosen_manifest",
    "chosen_manifest_file",
    "global_options",
    "package_places",
    "packaged_plugins",
    "run",
    "runs",
]

F = TypeVar("F", bound="Callable[..., Any]")

COMPLETE = "_ENGINE_PLUGIN_COMPLETE"
"""The variable that a shell sets when it asks click for names."""


@dataclass
class Options:
    """The global options, wherever on the command line they stood."""

    plugin: Path | None = None
    named: str = ""
    """The plugin as a command line names it, "" when it need not be named."""
    json: bool = False
    verbose: bool = False
    _noted: set[str] = field(default_factory=set, repr=False)

    def note(self, text: str) -> None:
        """Say something about the choice of the plugin on standard error, once, and not to a shell that completes."""
        from engine_plugin.cli.output import say

        if text not in self._noted and COMPLETE not in os.environ:
            say(text)
        self._noted.add(text)

    def advice(self, text: str) -> str:
        """A message whose commands can be run here, on the chosen plugin."""
        from engine_plugin.cli.advice import advice  # only messages need it

        return advice(text, self.named)


def advised(text: str) -> str:
    """`Options.advice` of the command that runs now."""
    ctx = click.get_current_context(silent=True)
    options = ctx.find_object(Options) if ctx else None
    return options.advice(text) if options else text


class _PluginPlace(click.Path):
    """A directory, or the name of a plugin that comes with this package beside the default one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            if ctx is not None:
                ctx.ensure_object(Options).named = value
            if not Path(value).exists():
                if place := _packaged(value):
                    return place
                names = ", ".join(packaged_plugins())
                self.fail(f"directory {value!r} does not exist, and with this package come {names}", param, ctx)
        return super().convert(value, param, ctx)


def _packaged(name: str) -> Path | None:
    """The directory of a plugin that comes with this package, by its name."""
    if name == _default_name():
        return _bundled().parent
    found = (place / "plugins" / name for place in package_places() if re.fullmatch(r"\w+", name))
    return next((place for place in found if (place / "plugin.yaml").is_file()), None)


def packaged_plugins() -> list[str]:
    """The names that --plugin takes for the plugins that come with this package."""
    beside = {file.parent.name for place in package_places() for file in place.glob("plugins/*/plugin.yaml")}
    return sorted({*filter(None, [_default_name()]), *beside})


def _default_name() -> str:
    """The name of the plugin that is taken when none is chosen, which is its engine's; "" when there is none."""
    from engine_plugin.manifest import load_manifest

    try:
        return load_manifest(_bundled()).engine_name
    except (ManifestError, NotFoundError):
        return ""


def global_options(command: F) -> F:
    """Take --plugin, --json and -v; they may stand before a command's name and after it."""

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
    from engine_plugin.cli.names import plugin_names  # which is only for a shell that asks

    return plugin_names(ctx, parameter, incomplete)


def runs(command: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a click command of a coroutine function whose first argument is Options."""

    @click.pass_obj
    @wraps(command)
    def start(options: Options, /, *arguments: Any, **named: Any) -> None:
        run(options, command(options, *arguments, **named))

    return start


def run(options: Options, work: Coroutine[Any, Any, None]) -> None:
    """Run a command's coroutine. Ctrl-C cancels it; what it holds is released before the command ends."""
    from engine_plugin.cli.logs import set_up_logging

    set_up_logging("DEBUG" if options.verbose else "")

    async def interruptible() -> None:
        handle_signal(signal.SIGINT, signal.getsignal(signal.SIGINT))  # asyncio's own, which a sleeping loop misses
        await work

    asyncio.run(interruptible())


def chosen_manifest(options: Options) -> Manifest:
    """The manifest that --plugin, the environment, the working directory or this package gives, in this order.

    Raises NotFoundError when a directory that was named holds none, ManifestError when it is wrong, PreconditionError
    for a data directory that cannot be trusted.
    """
    from engine_plugin.manifest import load_manifest
    from engine_plugin.trust import require_data_dir

    manifest = load_manifest(chosen_manifest_file(options))
    require_data_dir(manifest.data_dir)
    return manifest


def chosen_manifest_file(options: Options) -> Path:
    """The file that `chosen_manifest` reads."""
    from engine_plugin.manifest import find_manifest, manifest_file

    named = options.plugin or _in_the_environment()
    if named is not None:
        file = manifest_file(named.absolute())
        if file is None:
            said = "--plugin" if options.plugin else PLUGIN_DIR
            raise NotFoundError(
                f"there is no plugin.yaml in {named}. Name a plugin's directory with {said}, or one of those that "
                f"come with this package: {', '.join(packaged_plugins())}."
            )
        return file
    try:
        return find_manifest([Path.cwd()], passed_over=options.note)
    except (ManifestError, OSError):
        return _bundled()


def _in_the_environment() -> Path | None:
    named = os.environ.get(PLUGIN_DIR, "")
    if not named or Path(named).exists():
        return Path(named) if named else None
    return _packaged(named) or Path(named)


def package_places() -> tuple[Path, Path]:
    """Where plugins may lie that come with us: a wheel carries them in the package, a checkout beside it."""
    import engine_plugin

    package = Path(engine_plugin.__file__).parent
    return package, package.parent


def _bundled() -> Path:
    for place in package_places():
        if (place / "plugin.yaml").is_file():
            return place / "plugin.yaml"
    raise NotFoundError(
        f"no plugin.yaml here or above, and none came with this package. Use --plugin DIR or {PLUGIN_DIR}."
    )
