"""`engine-plugin`: the commands, and the one place that turns errors into messages and exit statuses."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

import click

from engine_plugin import __version__
from engine_plugin.cli import COMMANDS
from engine_plugin.cli.context import COMPLETE, Options
from engine_plugin.cli.options import Group
from engine_plugin.cli.output import harmless
from engine_plugin.errors import (
    DeadlineError,
    EnginePluginError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from engine_plugin.redaction import redacted
from engine_plugin.system.utf8 import begin_in_utf8, speak_utf8

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["EXIT_CODES", "cli", "main"]

INTERRUPTED = 130

EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (NotFoundError, 3),
    (PreconditionError, 4),
    (UnavailableError, 4),
    (DeadlineError, 124),
    (EnginePluginError, 1),
    (OSError, 1),
)
"""The exit status of an error: that of the first matching class. 2 is wrong usage, 130 is Ctrl-C."""

_MAX_LINES = 2


class _Commands(Mapping[str, click.Command]):
    """The commands by name. A command's module is imported when the command is first used."""

    def __getitem__(self, name: str) -> click.Command:
        command: click.Command = getattr(import_module(f"engine_plugin.cli.{COMMANDS[name]}"), name)
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


@click.group(cls=Group, commands=_Commands(), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="engine-plugin")
def cli() -> None:
    """Run, inspect and call plugins that put a local AI engine under a host's control."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 0, or with a status of docs/cli.md and one or two lines on standard error."""
    if arguments is None:
        begin_in_utf8()
    speak_utf8()
    options = Options()
    if COMPLETE in os.environ:
        from engine_plugin.cli.completion import offer_shells

        offer_shells()
    try:
        status = cli.main(args=arguments, prog_name="engine-plugin", obj=options, standalone_mode=False)
    except click.exceptions.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        click.echo(redacted(shown.getvalue()), err=True, nl=False)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        _report(options, error, "interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - the outermost edge: prints a message instead of a traceback
        _report(options, error, _explain(error))
        sys.exit(next((status for kind, status in EXIT_CODES if isinstance(error, kind)), 1))
    sys.exit(status if isinstance(status, int) else 0)


def _explain(error: Exception) -> str:
    if isinstance(error, EnginePluginError):
        from engine_plugin.cli.advice import explained

        return explained(error) or type(error).__name__
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    return f"internal error: {type(error).__name__}: {error}. Run the command with -v and report the traceback."


def _report(options: Options, error: BaseException, text: str) -> None:
    if options.verbose:
        click.echo(redacted("".join(traceback.format_exception(error))), err=True, nl=False)
    lines = options.advice(redacted(text)).splitlines()
    if len(lines) > _MAX_LINES and not options.verbose:
        lines = [*lines[: _MAX_LINES - 1], f"(and {len(lines) - _MAX_LINES + 1} more; -v shows them)"]
    for line in lines:
        click.echo(f"engine-plugin: {harmless(line)}", err=True)


if __name__ == "__main__":
    main()
