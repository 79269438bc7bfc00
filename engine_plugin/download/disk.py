"""Is there room, and what to say when there is none."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.download.sizes import byte_size
from engine_plugin.errors import DownloadError
from engine_plugin.system.limits import NO_FILES, files_in_use

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["NO_ROOM", "ROOM_EVERY", "check_reserve", "check_room", "disk_error", "disk_reason"]

_MARGIN = 64 * 1024 * 1024
"""Bytes that stay free: a disk filled to the last byte breaks more than this download."""

_NO_INODE = "no inode is free: the file system cannot hold another file"

ROOM_EVERY = 16 * 1024 * 1024
"""Bytes between two checks of the free space: far fewer than the reserve."""

NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""The error numbers of a full disk and of a used-up quota."""


def check_room(folder: Path, needed: int, what: str = "the download") -> None:
    """Raise DownloadError when `needed` more bytes, of `what`, do not fit below `folder`."""
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
    """Raise DownloadError when a download of unknown size, of which `arrived` bytes are here, is filling the disk."""
    if shutil.disk_usage(folder).free < _MARGIN:
        raise _filled(
            folder, "the server does not say how long the file is, and the disk is nearly full", f"{arrived}"
        )


def disk_error(error: OSError, folder: Path, arrived: int, total: int) -> DownloadError:
    """The DownloadError for a failure while writing below `folder`."""
    if error.errno in NO_FILES:
        return DownloadError(f"{error.filename or folder}: {files_in_use(error)}")
    if error.errno not in NO_ROOM:
        return catalogue.DISK_WRITE_REFUSED.error(place=error.filename or folder, reason=error.strerror or error)
    return _filled(folder, error.strerror, f"{arrived} of {total}" if total else f"{arrived}")


def disk_reason(error: OSError, folder: Path) -> str:
    """Why a file below `folder` could not be written; a disk without free inodes is distinguished from a full one."""
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
    """Whether a file system that counts its files can hold no further one."""
    if sys.platform == "win32":
        return False
    try:
        here = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        system = os.statvfs(here)
    except OSError:
        return False
    return bool(system.f_files) and not system.f_favail
