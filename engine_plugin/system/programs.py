"""Checks whether a program can and may be run, for a better message than "Permission denied"."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from engine_plugin.system.trust import Doubt, distrust

__all__ = ["noexec_doubt", "program_doubt"]

_FIRST_LINE = 256
_OTHER_PLACE = "Move it to another file system, or mount this one without noexec"


def program_doubt(path: Path) -> Doubt | None:
    """Why the file at `path` cannot be run; None if it can. Blocking, never raises.

    Checks owner, mount, permissions, and the interpreter that a script names.
    """
    return distrust(path) or noexec_doubt(path) or _mode_doubt(path) or _script_doubt(path)


def noexec_doubt(path: Path) -> Doubt | None:
    """Whether `path`, or the part of it that exists, is on a file system mounted noexec.

    Blocking, never raises.
    """
    try:
        while not path.exists() and path != path.parent:
            path = path.parent
        flags = os.statvfs(path).f_flag if hasattr(os, "statvfs") else 0
        if not flags & getattr(os, "ST_NOEXEC", 0):
            return None
        mount = path.resolve()
        while not os.path.ismount(mount):
            mount = mount.parent
    except OSError:
        return None
    return Doubt(f"{path} is on a file system mounted noexec ({mount}), where nothing can be run", _OTHER_PLACE)


def _mode_doubt(path: Path) -> Doubt | None:
    if os.access(path, os.X_OK):
        return None
    return Doubt(f"{path} is not executable", f"Run: chmod +x {shlex.quote(str(path))}")


def _script_doubt(path: Path) -> Doubt | None:
    if os.name == "nt":
        return None
    try:
        with path.open("rb") as file:
            line = file.readline(_FIRST_LINE)
    except OSError:
        return None  # an executable need not be readable
    if not line.startswith(b"#!"):
        return None
    if line.endswith(b"\r\n"):
        what = f"the first line of {path} ends with CR LF, so the system looks for an interpreter of a wrong name"
        return Doubt(what, "Save the file with LF line ends, or build the plugin again")
    words = os.fsdecode(line[2:]).split(maxsplit=1)
    if words and Path(words[0]).is_absolute() and not Path(words[0]).exists():
        return Doubt(f"{path} names the interpreter {words[0]}, which does not exist", "Install it, or build again")
    return None
