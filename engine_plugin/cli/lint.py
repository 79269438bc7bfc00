"""`engine-plugin lint`: reports all problems of a plugin.yaml."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine_plugin.cli.options import Command
from engine_plugin.cli.output import print_json, say
from engine_plugin.cli.plugins import chosen_manifest_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.cli.context import Options
    from engine_plugin.errors import Problem
    from engine_plugin.manifest import Manifest

__all__ = ["lint"]


@click.command(cls=Command)
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(exists=True, path_type=Path))
def lint(options: Options, directory: Path | None) -> None:
    """Check a plugin.yaml and show each problem with its line and a fix. Exits with 1 if there is an error."""
    from engine_plugin.manifest import lint as find_problems

    problems = find_problems(directory or chosen_manifest_file(options).parent, check_engine=_engine_problems)
    errors = sum(problem.severity == "error" for problem in problems)
    if options.json:
        print_json([asdict(problem) for problem in problems])
    else:
        for problem in problems:
            click.echo(str(problem))
        say(f"{errors} errors, {len(problems) - errors} warnings" if problems else "no problems")
    if errors:
        click.get_current_context().exit(1)


def _engine_problems(manifest: Manifest) -> Sequence[Problem]:
    from engine_plugin.engines.base import UnknownEngineError, engine_class

    try:
        return engine_class(manifest.engine_name).check_options(manifest)
    except UnknownEngineError as error:
        return [manifest.problem(("engine", "name"), error.what, error.fix)]
