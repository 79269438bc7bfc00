"""What a command was called with, and its messages in the words of the person who called it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["COMPLETE", "Options", "advised"]

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
    noted: set[str] = field(default_factory=set, repr=False)
    """What has been said about the choice of the plugin."""

    def advice(self, text: str) -> str:
        """A message whose commands can be run here, on the chosen plugin."""
        from engine_plugin.cli.advice import advice  # only messages need it

        return advice(text, self.named)


def advised(text: str) -> str:
    """`Options.advice` of the command that runs now."""
    ctx = click.get_current_context(silent=True)
    options = ctx.find_object(Options) if ctx else None
    return options.advice(text) if options else text
