"""A model folder that is still arriving: the files that are whole and verified, and the one on its way.

`.partial/<key>.files/<last part of the name>/` holds the whole files, `.partial/<key>.arriving/` the others as
partials (partial.py), `.partial/<key>.lock` keeps two processes from filling it at once; `=` in the key stands for
the `/` of a name. All survive a restart of the plugin.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from engine_plugin.download.partial import Partial
from engine_plugin.models.tree import files_of, throw_away
from engine_plugin.system.files import BLOCK, in_thread, opened, private_folder, sync_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

__all__ = ["Staging", "digests_of"]


class Staging:
    """What arrived of one model. Those of its methods that are not async block: call them in a thread."""

    def __init__(self, folder: Path, name: str) -> None:
        key = name.replace("/", "=")
        self._lock = Partial(folder, key)
        self._whole = folder / f"{key}.files"
        self._arriving = folder / f"{key}.arriving"
        self.files = self._whole / name.rpartition("/")[2]
        """The folder that becomes the model; it is called as the model is."""
        self.size = 0

    def locked(self, waiting: Callable[[], None]) -> AbstractAsyncContextManager[None]:
        """Hold it against other processes; `waiting` is called once if another one holds it now."""
        return self._lock.locked(waiting)

    def leftovers(self) -> bool:
        """Whether an unfinished pull left anything here."""
        return self._whole.exists() or self._arriving.exists()

    def discard(self) -> None:
        """Delete all that arrived."""
        throw_away(self._whole)
        throw_away(self._arriving)

    def prepare(self, paths: Iterable[str]) -> dict[str, int]:
        """Make the folders, delete what is none of `paths`, and return the sizes of the whole files."""
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
        """The partial of a file on its way."""
        return Partial(self._arriving, _key(path))

    def place(self, path: str) -> Path:
        """Where a whole file is, or shall be; its folder exists."""
        target = self.files / path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return target

    def arrived(self, partial: Partial, path: str) -> None:
        """A partial is whole and verified: it becomes the file."""
        partial.path.replace(self.place(path))
        partial.forget()

    def sync(self) -> None:
        """Have all of it on the disk, names included."""
        sync_tree(self.files)

    def sweep(self) -> None:
        """Delete what is empty: nothing arrived, or the model is in its place."""
        for folder in (self._arriving, self.files, self._whole):
            with suppress(OSError):
                folder.rmdir()

    def here(self) -> int:
        """Bytes of files on their way, from earlier pulls."""
        return sum(left.stat().st_size for left in self._arriving.glob("*.part"))


def _key(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:32]


async def digests_of(path: Path) -> tuple[int, str, str]:
    """A file's size, its SHA-256, and its SHA-1 as git names its blobs, in hex. Raises OSError."""
    async with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        sha256 = hashlib.sha256()
        blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

        def step() -> int:
            block = file.read(BLOCK)
            sha256.update(block)
            blob.update(block)
            return len(block)

        while await in_thread(step):
            pass
    return size, sha256.hexdigest(), blob.hexdigest()
