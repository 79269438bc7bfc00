"""Holds on installed versions: while a process that runs a version holds its directory, it is not removed.

On POSIX a hold is a shared lock (flock) on the directory itself, which ends with the process. On Windows it is an
open file: Windows does not rename the directory of an open file. On a file system without locks, holds have no
effect.
"""

from __future__ import annotations

import os
import shutil
import sys
import weakref
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Hold", "hold_version", "remove_unless_held"]


class Hold:
    """Protects a version from removal, by any process, until `release`. Without a descriptor it has no effect."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._close = weakref.finalize(self, os.close, descriptor) if descriptor is not None else None

    def release(self) -> None:
        """Release the hold. Idempotent; garbage collection also releases it, for a caller that was cancelled."""
        if self._close is not None:
            self._close()


def hold_version(folder: Path, file: str) -> Hold | None:
    """Hold the directory of a version, which contains `file`; None if it is missing or being removed. Blocking."""
    try:
        descriptor = os.open(folder / file if sys.platform == "win32" else folder, os.O_RDONLY)
    except OSError:
        return None if not folder.is_dir() else Hold()
    if _locked(descriptor, exclusive=False) and _is_at(descriptor, folder):
        return Hold(descriptor)
    os.close(descriptor)
    return None


def remove_unless_held(folder: Path, aside: Path) -> None:
    """Rename a directory to `aside`, then delete it; does nothing if it is held. Blocking."""
    with suppress(OSError), ExitStack() as cleanup:
        if sys.platform != "win32":
            descriptor = os.open(folder, os.O_RDONLY)
            cleanup.callback(os.close, descriptor)
            if not _locked(descriptor, exclusive=True):
                return
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _locked(descriptor: int, *, exclusive: bool) -> bool:
    """Lock an open directory; return False if a conflicting lock exists."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # no locks on this file system
    return True


def _is_at(descriptor: int, folder: Path) -> bool:
    """Whether `folder` still names the open directory."""
    if sys.platform == "win32":
        return True
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except OSError:
        return False
