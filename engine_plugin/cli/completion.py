"""`engine-plugin completion`: the script with which a shell completes commands, options and names."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, ClassVar

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

from engine_plugin.cli.context import COMPLETE
from engine_plugin.cli.options import Command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine_plugin.cli.context import Options

__all__ = ["PROGRAM", "completion", "offer_shells"]

PROGRAM = "engine-plugin"

_BASH = """\
%(complete_func)s() {
    local type value
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            dir) compopt -o dirnames 2>/dev/null ;;
            file) compopt -o default 2>/dev/null ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done < <(COMP_LINE="${COMP_LINE:0:$COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \
%(complete_var)s=bash_complete "$1" 2>/dev/null)
}
complete -o nosort -F %(complete_func)s %(prog_name)s 2>/dev/null || complete -F %(complete_func)s %(prog_name)s
"""

_POWERSHELL = """\
Register-ArgumentCompleter -Native -CommandName %(prog_name)s -ScriptBlock {
    param($word, $command, $cursor)
    $before = $command.CommandElements | Where-Object { $_.Extent.EndOffset -lt $cursor } | ForEach-Object {
        if ($_ -is [System.Management.Automation.Language.StringConstantExpressionAst]) { $_.Value } else { "$_" }
    }
    $env:COMP_WORDS = $before -join "`n"
    $env:COMP_WORD = $word
    $env:%(complete_var)s = 'powershell_complete'
    try {
        & %(prog_name)s 2>$null | ForEach-Object {
            $value, $help = $_ -split "`t", 2
            [System.Management.Automation.CompletionResult]::new($value, $value, 'ParameterValue', $help)
        }
    } finally {
        Remove-Item Env:COMP_WORDS, Env:COMP_WORD, Env:%(complete_var)s -ErrorAction Ignore
    }
}
"""


class _Bash(BashComplete):
    """click's completion, for names with a colon too: bash splits words at colons and replaces the last part."""

    source_template: ClassVar[str] = _BASH

    @staticmethod
    def _check_version() -> None:
        """Accept every bash. Before 4.4 the script works too, but the names appear in another order."""

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1:].isspace() else ""
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{item.value[self._replaced() :]}"

    def _replaced(self) -> int:
        """Return how many leading characters of the name bash keeps."""
        word = self.get_completion_args()[1].rpartition("=")[2]
        return word.rfind(":") + 1 if ":" in os.environ.get("COMP_WORDBREAKS", "") else 0


class _PowerShell(ShellComplete):
    """PowerShell's native argument completers, of Windows PowerShell 5.1 and PowerShell 7."""

    name: ClassVar[str] = "powershell"
    source_template: ClassVar[str] = _POWERSHELL

    def get_completion_args(self) -> tuple[list[str], str]:
        return os.environ.get("COMP_WORDS", "").splitlines()[1:], os.environ.get("COMP_WORD", "")

    def format_completion(self, item: CompletionItem) -> str:
        """Return a name and its tooltip; "" for files, which PowerShell completes by itself."""
        return f"{item.value}\t{item.help or item.value}" if item.type == "plain" else ""

    def complete(self) -> str:
        return re.sub(r"\n{2,}", "\n", super().complete()).strip("\n")


_SHELLS: Mapping[str, type[ShellComplete]] = {
    "bash": _Bash,
    "zsh": ZshComplete,
    "fish": FishComplete,
    "powershell": _PowerShell,
}


def offer_shells() -> None:
    """Register the shells with click. Called before click handles a completion request."""
    for name, shell in _SHELLS.items():
        add_completion_class(shell, name)


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(list(_SHELLS)))
def completion(_options: Options, shell: str) -> None:
    """Print the script that completes commands, options and names of models, services and plugins in SHELL.

    Add the line for your shell to its start-up file:

    \b
    bash, ~/.bashrc                        eval "$(engine-plugin completion bash)"
    zsh, ~/.zshrc (after compinit)         eval "$(engine-plugin completion zsh)"
    fish, ~/.config/fish/config.fish       engine-plugin completion fish | source
    powershell, the file $PROFILE          engine-plugin completion powershell | Out-String | Invoke-Expression
    """
    click.echo(
        _SHELLS[shell](click.get_current_context().find_root().command, {}, PROGRAM, COMPLETE).source(), nl=False
    )
