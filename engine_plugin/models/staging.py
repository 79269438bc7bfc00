"""The files that an interrupted pull leaves.

`.partial/<key>.part` is the incomplete file of a model that is one file at its source (download/partial.py),
`.partial/<key>.files/<last part of the name>/` holds the complete files of another model, `.partial/<key>.arriving/`
its others as partials, `.partial/<key>.lock` keeps two processes from pulling it at once; `=` in the key stands for
the `/` of a name. All survive a restart of the plugin.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from engine_plugin.download.partial import Partial
from engine_plugin.models.layout import delete_tree, files_of
from engine_plugin.system.files import BLOCK, in_thread, opened, private_folder, sync_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

__all__ = ["Staging", "digests_of"]


class Staging:
    """The files of an incomplete model. All methods but `locked` block: call them in a thread."""

    def __init__(self, folder: Path, name: str) -> None:
        key = name.replace("/", "=")
        self.file = Partial(folder, key)
        self._whole = folder / f"{key}.files"
        self._arriving = folder / f"{key}.arriving"
        self.files = self._whole / name.rpartition("/")[2]
        """The folder that becomes the model; it has its name."""

    def locked(self, waiting: Callable[[], None]) -> AbstractAsyncContextManager[None]:
        """Lock it against other processes; `waiting` is called once if another process holds the lock."""
        return self.file.locked(waiting)

    def leftovers(self) -> bool:
        """Whether an interrupted pull left anything."""
        return any(path.exists() for path in (self.file.path, self._whole, self._arriving))

    def discard(self) -> None:
        """Delete all that arrived."""
        self.file.discard()
        delete_tree(self._whole)
        delete_tree(self._arriving)

    def prepare(self, paths: Iterable[str]) -> dict[str, int]:
        """Make the folders, delete all files but `paths`, and return the sizes of the complete ones."""
        for folder in (self._whole, self.files, self._arriving):
            private_folder(folder)
        wanted = set(paths)
        sizes = {path: stat.st_size for path, stat in files_of(self.files)}
        for path in sizes.keys() - wanted:
            (self.files / path).unlink()
        kept = {_key(path) for path in wanted}
        for left in self._arriving.iterdir():
            if left.name.partition(".")[0] not in kept:
                left.unlink()
        return {path: size for path, size in sizes.items() if path in wanted}

    def arriving(self, path: str) -> Partial:
        """The partial of an incomplete file."""
        return Partial(self._arriving, _key(path))

    def place(self, path: str) -> Path:
        """The path of a complete file. Creates its folder."""
        target = self.files / path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return target

    def arrived(self, partial: Partial, path: str) -> None:
        """Move a complete and verified partial to the path of the file."""
        partial.path.replace(self.place(path))
        partial.forget()

    def sync(self) -> None:
        """Flush the complete files and their folders to the disk."""
        sync_tree(self.files)

    def sweep(self) -> None:
        """Delete the empty folders."""
        for folder in (self._arriving, self.files, self._whole):
            with suppress(OSError):
                folder.rmdir()

    def here(self) -> int:
        """The bytes of the incomplete files."""
        return sum(left.stat().st_size for left in self._arriving.glob("*.part"))


def _key(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:32]


async def digests_of(path: Path) -> tuple[str, str]:
    """The SHA-256 of a file, and the SHA-1 of its git blob, in hex. Raises OSError."""
    async with opened(path) as file:
        sha256 = hashlib.sha256()
        blob = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)

        def step() -> int:
            block = file.read(BLOCK)
            sha256.update(block)
            blob.update(block)
            return len(block)

        while await in_thread(step):
            pass
    return sha256.hexdigest(), blob.hexdigest()
