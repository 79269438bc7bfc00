"""Holds on installed versions: a process that runs a version holds its directory, which is then not removed.

On POSIX a hold is a shared lock (flock) on the directory itself, which ends with the process. Windows renames no
directory in which a file is open. A file system without locks protects nothing.
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

__all__ = ["Hold", "hold", "remove_unless_held"]


class Hold:
    """Keeps a version from being removed, in this process and in others, until `release`. Without one: nothing."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._close = weakref.finalize(self, os.close, descriptor) if descriptor is not None else None

    def release(self) -> None:
        """Let it be removed. Idempotent; a hold that its caller has lost, being cancelled, is released, too."""
        if self._close is not None:
            self._close()


def hold(folder: Path, file: str) -> Hold | None:
    """Hold a version's directory, in which `file` lies; None when it is gone, or just being removed. Blocking."""
    try:
        descriptor = os.open(folder / file if sys.platform == "win32" else folder, os.O_RDONLY)
    except OSError:
        return None if not folder.is_dir() else Hold()
    if _locked(descriptor, exclusive=False) and _is_at(descriptor, folder):
        return Hold(descriptor)
    os.close(descriptor)
    return None


def remove_unless_held(folder: Path, aside: Path) -> None:
    """Move a directory to `aside` in one step, then delete it; one that is held stays as it is. Blocking."""
    with suppress(OSError), ExitStack() as cleanup:
        if sys.platform != "win32":
            descriptor = os.open(folder, os.O_RDONLY)
            cleanup.callback(os.close, descriptor)
            if not _locked(descriptor, exclusive=True):
                return
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _locked(descriptor: int, *, exclusive: bool) -> bool:
    """Lock an open directory, unless another lock is in the way."""
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
    """Whether the open directory still is the one of that name."""
    if sys.platform == "win32":
        return True
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except OSError:
        return False
