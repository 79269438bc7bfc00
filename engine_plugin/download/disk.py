"""Free disk space: checks before and during a download, and the errors for a disk that is full."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.errors import DownloadError
from engine_plugin.system.limits import NO_FILES, files_in_use
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["NO_ROOM", "ROOM_EVERY", "check_reserve", "check_room", "disk_error", "disk_reason"]

_MARGIN = 64 * 1024 * 1024
"""Bytes that stay free, since other programs need some, too."""

_NO_INODE = "no inode is free: the file system cannot hold another file"

ROOM_EVERY = 16 * 1024 * 1024
"""Bytes between two checks of the free space; far fewer than the margin."""

NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""The error numbers of a full disk and of a used-up quota."""


def check_room(folder: Path, needed: int, what: str = "the download") -> None:
    """Raise DownloadError unless `needed` more bytes of `what` fit below `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed + _MARGIN:
        raise catalogue.DISK_FULL.error(
            folder=folder,
            free=byte_size(free),
            free_bytes=free,
            what=what,
            needed=byte_size(needed),
            needed_bytes=needed,
            spare=byte_size(_MARGIN),
        )


def check_reserve(folder: Path, arrived: int) -> None:
    """Raise DownloadError when a download of unknown size, `arrived` bytes so far, has nearly filled the disk."""
    if shutil.disk_usage(folder).free < _MARGIN:
        raise _filled(
            folder, "the server did not announce the size of the file, and the disk is nearly full", f"{arrived}"
        )


def disk_error(error: OSError, folder: Path, arrived: int, total: int) -> DownloadError:
    """The DownloadError for an OSError while writing below `folder`, `arrived` of `total` bytes (0: unknown)."""
    if error.errno in NO_FILES:
        return DownloadError(f"{error.filename or folder}: {files_in_use(error)}")
    if error.errno not in NO_ROOM:
        return catalogue.DISK_WRITE_REFUSED.error(place=error.filename or folder, reason=error.strerror or error)
    return _filled(folder, error.strerror, f"{arrived} of {total}" if total else f"{arrived}")


def disk_reason(error: OSError, folder: Path) -> str:
    """Why a file below `folder` could not be written: the system's words, and whether no inode is free."""
    reason = str(error.strerror or error)
    return f"{reason} ({_NO_INODE})" if error.errno in NO_ROOM and _without_inodes(folder) else reason


def _filled(folder: Path, reason: object, arrived: str) -> DownloadError:
    try:
        free = f"{shutil.disk_usage(folder).free} bytes are free"
    except OSError:
        free = "no room is left"
    if _without_inodes(folder):
        free = f"{free}, but {_NO_INODE}"
    return catalogue.DISK_FILLED.error(folder=folder, reason=reason, arrived=arrived, free=free)


def _without_inodes(folder: Path) -> bool:
    """Whether the file system has no free inode. Some file systems do not count them."""
    if sys.platform == "win32":
        return False
    try:
        here = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        system = os.statvfs(here)
    except OSError:
        return False
    return bool(system.f_files) and not system.f_favail
