"""The files of models that are folders."""

from __future__ import annotations

import os
import time
from stat import S_ISREG
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["WatchedFolders", "entries_below", "files_of"]

_SETTLED = 2_000_000_000
"""Nanoseconds after which the next change of a folder certainly gives it another modification time, on any file
system."""


def entries_below(folder: Path, folders: dict[str, int] | None = None) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Each file, link or other entry below a folder that is not hidden, by its path, with `/`. Raises OSError.

    `folders` gets the modification time of each folder, the outermost one included, as it was before its entries.
    """
    waiting = [(str(folder), "")]
    while waiting:
        here, prefix = waiting.pop()
        if folders is not None:
            folders[here] = os.stat(here).st_mtime_ns  # noqa: PTH116  # of a string, as scandir gives them
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, f"{prefix}{entry.name}/"))
                else:
                    yield f"{prefix}{entry.name}", entry


def files_of(folder: Path) -> list[tuple[str, os.stat_result]]:
    """The files of a model: each path below its folder, with `/`, and its stat; sorted. Links to files are followed.

    Raises OSError.
    """
    found = [(path, entry.stat()) for path, entry in entries_below(folder) if entry.is_file()]
    return sorted(found, key=lambda file: file[0])


class _Known(NamedTuple):
    folders: dict[str, int]
    files: list[str]


class WatchedFolders:
    """The stats of models' files, for models that are looked at with each call.

    Which files there are is read again when a folder's modification time has changed; the files' own sizes and times
    are read each time.
    """

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def stats(self, folder: Path) -> list[os.stat_result]:
        """The stats of the files of a model, as `files_of` finds them, in any order. Raises OSError."""
        known = self._known.pop(str(folder), None)
        if known is not None:
            try:
                times = [stat.st_mtime_ns for stat in map(os.stat, known.folders)]
                stats = list(map(os.stat, known.files)) if times == list(known.folders.values()) else []
            except OSError:  # a file or folder has gone
                stats = []
            if stats and all(S_ISREG(stat.st_mode) for stat in stats):
                self._known[str(folder)] = known
                return stats
        return self._read(folder)

    def _read(self, folder: Path) -> list[os.stat_result]:
        now, folders = time.time_ns(), dict[str, int]()
        entries = [entry for _, entry in entries_below(folder, folders)]
        files = [entry for entry in entries if entry.is_file()]
        stats = [entry.stat() for entry in files]
        # A link that leads nowhere may lead to a file later, which changes no folder here.
        if files and len(files) == len(entries) and max(folders.values()) < now - _SETTLED:
            self._known[str(folder)] = _Known(folders, [entry.path for entry in files])
        return stats
