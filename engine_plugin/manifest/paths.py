"""Questions about the file system that never raise, and paths that keep the host's own way to a plugin."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["absolute", "exists", "is_directory", "is_file"]


def absolute(path: Path) -> Path:
    """`path` from the root on, without `.` and `..`. Links stay: a plugins directory may hold links to plugins."""
    return Path(os.path.normpath(path.absolute()))


def exists(path: Path) -> bool:
    """Whether there is anything at `path` that this process may know of."""
    return _mode(path) != 0


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file, or leads to one."""
    return stat.S_ISREG(_mode(path))


def is_directory(path: Path) -> bool:
    """Whether `path` is a directory, or leads to one."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    # Before Python 3.14 Path.is_file and its like raise when a parent directory may not be searched.
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0
