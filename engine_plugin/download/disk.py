"""Is there room, and what to say when there is none."""

from __future__ import annotations

import errno
import shutil
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.download.sizes import byte_size
from engine_plugin.errors import DownloadError
from engine_plugin.limits import NO_FILES, files_in_use

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["NO_ROOM", "check_room", "disk_error"]

_MARGIN = 64 * 1024 * 1024
"""Bytes that stay free: a disk filled to the last byte breaks more than this download."""

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


def disk_error(error: OSError, folder: Path, arrived: int, total: int) -> DownloadError:
    """The DownloadError for a failure while writing below `folder`."""
    if error.errno in NO_FILES:
        return DownloadError(f"{error.filename or folder}: {files_in_use(error)}")
    if error.errno not in NO_ROOM:
        return catalogue.DISK_REFUSES.error(place=error.filename or folder, reason=error.strerror or error)
    whole = f" of {total}" if total else ""
    try:
        free = f"{shutil.disk_usage(folder).free} bytes are free"
    except OSError:
        free = "no room is left"
    return catalogue.DISK_FILLED.error(folder=folder, reason=error.strerror, arrived=f"{arrived}{whole}", free=free)
