"""File system queries that never raise, and absolute paths that keep symbolic links."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["absolute", "exists", "is_directory", "is_file"]


def absolute(path: Path) -> Path:
    """Return the absolute path, without `.` and `..`. Links are kept: plugins can be links in their directory."""
    return Path(os.path.normpath(path.absolute()))


def exists(path: Path) -> bool:
    """Return whether `path` exists and is visible to this process."""
    return _mode(path) != 0


def is_file(path: Path) -> bool:
    """Return whether `path` is a regular file or a link to one."""
    return stat.S_ISREG(_mode(path))


def is_directory(path: Path) -> bool:
    """Return whether `path` is a directory or a link to one."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    # Before Python 3.14, Path.is_file and others raise if a parent directory cannot be searched.
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0
