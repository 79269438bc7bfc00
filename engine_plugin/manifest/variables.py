"""The variables in the `resources` and `engine` sections of a plugin.yaml.

| variable | value |
|---|---|
| `${AOG_DATA_DIR}` | the environment variable if it is an absolute path, else this user's data directory |
| `${DATA_DIR}` | `resources.data_dir`, expanded |
| `${PLUGIN_DIR}` | the directory of plugin.yaml |
| `${HOME}` | this user's home directory |

Values are not expanded again.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.manifest.sections import near, quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["VARIABLES", "VariableError", "Variables"]

VARIABLES = ("AOG_DATA_DIR", "DATA_DIR", "PLUGIN_DIR", "HOME")

_REFERENCE = re.compile(r"\$\{([^{}$]*)(\}?)")


class VariableError(Exception):
    """A text cannot be expanded; `what` is the problem, `fix` the next step."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


class Variables:
    """The values of the variables for one manifest, determined on first use."""

    def __init__(self, plugin_dir: Path, environ: Mapping[str, str]) -> None:
        self.data_dir: Path | None = None
        self.ignored_data_dir = ""
        """A relative AOG_DATA_DIR of the environment, which is ignored."""
        self._plugin_dir = plugin_dir
        self._environ = environ

    def expand(self, text: str) -> str:
        """Return `text` with its variables expanded. Raises VariableError."""
        return _REFERENCE.sub(self._replace, text)

    def _replace(self, match: re.Match[str]) -> str:
        name, end = match.groups()
        if not end:
            raise VariableError(f"contains {quoted('${' + name)} without a closing brace", "Add the brace: ${HOME}")
        if name == "PLUGIN_DIR":
            return str(self._plugin_dir)
        if name == "HOME":
            return self._home()
        if name == "AOG_DATA_DIR":
            return self._aog_data_dir()
        if name == "DATA_DIR":
            if self.data_dir is None:
                raise VariableError("uses ${DATA_DIR}, which is data_dir itself", "Use ${AOG_DATA_DIR} or ${HOME}")
            return str(self.data_dir)
        meant = near(name, VARIABLES)
        hint = f"Did you mean ${{{meant}}}? " if meant else ""
        known = ", ".join(f"${{{known}}}" for known in VARIABLES)
        raise VariableError(
            f"uses the unknown variable {quoted('${' + name + '}')}", f"{hint}The variables are {known}"
        )

    def _home(self) -> str:
        home = self._environ.get("USERPROFILE" if os.name == "nt" else "HOME", "")
        if home and Path(home).is_absolute():
            return home
        try:
            return str(Path.home())
        except RuntimeError as error:
            raise VariableError("uses ${HOME}, but this user has no home directory", "Set HOME") from error

    def _aog_data_dir(self) -> str:
        given = self._environ.get("AOG_DATA_DIR", "")
        if given and Path(given).is_absolute():
            return given
        self.ignored_data_dir = given
        import platformdirs  # not imported before the handshake if the host sets AOG_DATA_DIR

        try:
            found = platformdirs.user_data_dir("engine-plugin", appauthor=False)
        except (OSError, RuntimeError, KeyError):
            found = ""
        if not Path(found).is_absolute():
            what = "uses ${AOG_DATA_DIR}, but this user has no home directory"
            raise VariableError(
                what, "Set HOME or AOG_DATA_DIR in the environment, or resources.data_dir in this file"
            )
        return found
