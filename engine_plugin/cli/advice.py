"""Rewrites the next steps in messages as commands that can be pasted into this terminal.

A plugin's messages name each step by its rpc, because hosts read them too; the command line's own messages use
`engine-plugin …`. Both become the program as it was started, with the chosen plugin.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.catalogue import DEFAULT_MODEL_MISSING
from engine_plugin.cli import COMMANDS

if TYPE_CHECKING:
    from engine_plugin.errors import EnginePluginError

__all__ = ["advice", "explained", "program"]

_NAME = "engine-plugin"

_COMMAND_OF_RPC = {
    "StartEngine": "engine start",
    "StopEngine": "engine stop",
    "InstallEngine with cover": "engine install --cover",
    "InstallEngine": "engine install",
    "UpgradeEngine": "engine upgrade",
    "PullModel": "models pull",
    "DeleteModel": "models rm",
    "LoadModel": "models load",
    "UnloadModel": "models unload",
    "ListModels": "models list",
    "GetRunningModels": "models ps",
}
_RPC = re.compile(rf"\b(?:(?P<call>[Cc])all )?(?P<rpc>{'|'.join(_COMMAND_OF_RPC)})\b")

_STEPS = {DEFAULT_MODEL_MISSING.id: f"To choose another default, run {_NAME} models use NAME"}
"""By an error's id: a step that only the command line has."""

# A command of this program within a sentence. Without --plugin it would run on the default plugin.
_COMMAND = re.compile(rf"(?<![\w/.-]){_NAME}(?= (?:{'|'.join(COMMANDS)})\b)")


def explained(error: EnginePluginError) -> str:
    """An error's message, and below it the step that only the command line has."""
    return "\n".join(filter(None, (error.message, _STEPS.get(error.id))))


def advice(text: str, plugin: str = "") -> str:
    """Return the message with commands that can be run here. `plugin` is the value of --plugin, "" for none."""
    text = _RPC.sub(_command, text)
    command = f"{program()} --plugin {shlex.quote(plugin)}" if plugin else program()
    return _COMMAND.sub(lambda _: command, text)


def _command(found: re.Match[str]) -> str:
    run = {"C": "Run ", "c": "run ", None: ""}[found["call"]]
    return f"{run}{_NAME} {_COMMAND_OF_RPC[found['rpc']]}"


@cache
def program() -> str:
    """Return how to run this program: its name if it is on PATH, else its path, else `python -m`."""
    script = Path(sys.argv[0])
    if script.stem != _NAME:  # python -m
        script = Path(sys.executable).with_name(_NAME + (".exe" if sys.platform == "win32" else ""))
    on_path = shutil.which(_NAME)
    if on_path and script.exists() and Path(on_path).samefile(script):
        return _NAME
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m engine_plugin.cli.main"
    return shlex.quote(_from_here(script))


def _from_here(path: Path) -> str:
    """Return the path as one would type it: relative if it is below the working directory."""
    if not path.absolute().is_relative_to(Path.cwd()):
        return str(path)
    return os.path.join(".", path.absolute().relative_to(Path.cwd()))  # noqa: PTH118  # pathlib drops the dot
