"""File system queries that never raise, and absolute paths that keep symbolic links."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["absolute", "exists", "is_directory", "is_file"]

# Before Python 3.14, Path.is_file and others raise if a parent directory cannot be searched.
exists, is_directory, is_file = os.path.exists, os.path.isdir, os.path.isfile


def absolute(path: Path) -> Path:
    """Return the absolute path, without `.` and `..`. Links are kept: plugins can be links in their directory."""
    return Path(os.path.normpath(path.absolute()))
