"""Which of a user's pip settings apply to the installation of an engine: how packages are reached, nothing else.

pip takes settings from variables (`PIP_USER`) and from files (pip.conf). Those that choose where it installs, or
whether it does, would break an installation into the data directory; indexes, proxies and certificates are needed.
"""

from __future__ import annotations

import ast
import os
import re
from typing import TYPE_CHECKING

from engine_plugin.errors import InstallError
from engine_plugin.process import python

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["pip_environ"]

_KEPT = (
    "index-url",
    "extra-index-url",
    "no-index",
    "find-links",
    "proxy",
    "cert",
    "client-cert",
    "trusted-host",
    "keyring-provider",
    "use-deprecated",
    "timeout",
    "retries",
    "cache-dir",
    "no-cache-dir",
)
_LINE = re.compile(rf"(global|install)\.({'|'.join(_KEPT)})=(['\"].*)")
_LINE_ENDS = re.compile(r"\s*\n\s*")
_FILE = "PIP_CONFIG_FILE"
_LAST_WORDS = 300


async def pip_environ(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """The environment for an installation by pip: of the user's settings those that count, as `PIP_*` variables.

    `home` is the directory that holds pip, `environ` the user's environment. Raises InstallError when pip cannot read
    its files, OSError when it cannot be run.
    """
    clean = {name: value for name, value in environ.items() if not name.upper().startswith("PIP_")}
    env = python.module_environ(clean, home)
    files = {_FILE: environ[_FILE]} if _FILE in environ else {}
    # A file may say `quiet`, hence the -v; what pip says more is left out below.
    argv = python.module_command("pip", "-vvv", "config", "list")
    status, out, err = await python.run_briefly(argv, {**env, **files})
    if status != 0:
        words = " | ".join((err.strip() or out.strip()).decode("utf-8", "replace").splitlines())
        raise InstallError(
            f"pip cannot read its settings: {words[-_LAST_WORDS:] or f'exit code {status}'}. "
            f"Correct the file, or name another one in {_FILE}."
        )
    found = _in_files(out.decode("utf-8", "replace"))
    for name in _KEPT:
        if value := environ.get(_variable(name), "").strip():
            found[name] = value
    return {**env, **{_variable(name): value for name, value in found.items()}, _FILE: os.devnull}


def _in_files(listed: str) -> dict[str, str]:
    """The settings of `pip config list` that are kept; those for `install` alone count more than `global` ones."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}}
    for line in listed.splitlines():
        if match := _LINE.fullmatch(line.strip()):
            section, name, value = match.groups()
            sections[section][name] = _LINE_ENDS.sub(" ", str(ast.literal_eval(value))).strip()
    return {name: value for name, value in (sections["global"] | sections["install"]).items() if value}


def _variable(name: str) -> str:
    return f"PIP_{name.upper().replace('-', '_')}"
