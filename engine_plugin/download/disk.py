"""Is there room, and what to say when there is none."""

from __future__ import annotations

import errno
import shutil
from typing import TYPE_CHECKING

from engine_plugin.download.sizes import byte_size
from engine_plugin.errors import DownloadError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_room", "disk_error"]

_MARGIN = 64 * 1024 * 1024
"""Bytes that stay free: a disk filled to the last byte breaks more than this download."""

_NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})


def check_room(folder: Path, needed: int, what: str = "the download") -> None:
    """Raise DownloadError when `needed` more bytes, of `what`, do not fit below `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed + _MARGIN:
        raise DownloadError(
            f"{folder} has {byte_size(free)} free ({free} bytes), {what} needs {byte_size(needed)} more "
            f"({needed} bytes) and {byte_size(_MARGIN)} to spare: free some space or move the data directory."
        )


def disk_error(error: OSError, folder: Path, arrived: int, total: int) -> DownloadError:
    """The DownloadError for a failure while writing below `folder`."""
    if error.errno not in _NO_ROOM:
        return DownloadError(f"{error.filename or folder}: {error.strerror or error}. Check the data directory.")
    whole = f" of {total}" if total else ""
    try:
        free = f"{shutil.disk_usage(folder).free} bytes are free"
    except OSError:
        free = "no room is left"
    return DownloadError(
        f"{folder}: {error.strerror} after {arrived}{whole} bytes; {free}. Free some space or move the data "
        "directory, then try again: what arrived is kept."
    )
