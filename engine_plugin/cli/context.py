"""The global options of a command, and messages with commands that can be run here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pathlib import Path

    from engine_plugin.manifest import Manifest

__all__ = ["COMPLETE", "Options", "advised"]

COMPLETE = "_ENGINE_PLUGIN_COMPLETE"
"""The variable that the completion script of a shell sets to request names from click."""


@dataclass
class Options:
    """The global options, given before or after a command's name."""

    plugin: Path | None = None
    named: str = ""
    """The value of --plugin for proposed commands, "" for none."""
    json: bool = False
    verbose: bool = False
    manifest: Manifest | None = field(default=None, repr=False)
    """The chosen plugin's manifest, once `plugins.chosen_manifest` has loaded it."""

    def advice(self, text: str) -> str:
        """Return the message with commands that can be run here, on the chosen plugin."""
        from engine_plugin.cli.advice import advice  # only messages need it

        return advice(text, self.named)


def advised(text: str) -> str:
    """Apply `Options.advice` of the current command."""
    ctx = click.get_current_context(silent=True)
    options = ctx.find_object(Options) if ctx else None
    return options.advice(text) if options else text
