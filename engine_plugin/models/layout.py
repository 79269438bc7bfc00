"""The layout of a store: the paths of models, of records, and of what an interrupted pull leaves.

A folder with files in it is a model, one with folders only is an owner. Names that begin with a dot are ignored.
Nothing is written into the folder of a model.

`.partial/<key>.part` is the incomplete file of a model that is one file at its source (download/partial.py),
`.partial/<key>.files/<last part of the name>/` holds the complete files of another model, `.partial/<key>.arriving/`
its others as partials, `.partial/<key>.lock` keeps two processes from pulling it at once; `=` in the key stands for
the `/` of a name. All survive a restart of the plugin.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING

from engine_plugin.download.partial import Partial
from engine_plugin.errors import InvalidRequestError
from engine_plugin.models.folders import WatchedFolders, entries_below, files_of
from engine_plugin.models.names import is_model_name, other_case
from engine_plugin.system.files import (
    hash_rest,
    opened,
    private_folder,
    sha256_of,
    sync_folder,
    sync_tree,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import AbstractAsyncContextManager

__all__ = [
    "Extent",
    "FileLayout",
    "FolderLayout",
    "Found",
    "Layout",
    "Staging",
    "delete_tree",
    "digest_of_files",
    "digest_of_folder",
    "digests_of",
    "files_of",
    "files_to_copy",
    "fingerprint",
]


@dataclass(frozen=True, slots=True)
class Extent:
    """A cheap check for changes of a model: its bytes, and its modification time (ns since the epoch)."""

    size: int
    mtime_ns: int


class Layout(ABC):
    """The paths of the models below a root. All methods but `digest` block."""

    folders: bool
    """Whether a model is a folder; its name may have an owner then: `owner/name`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.partials = root / ".partial"

    def is_name(self, name: object) -> bool:
        """Whether a model may have this name."""
        return is_model_name(name, owner=self.folders)

    @abstractmethod
    def path(self, name: str) -> Path:
        """The path of a model, present or not. The name must be valid."""

    @abstractmethod
    def record(self, name: str) -> Path:
        """The path of its record, present or not."""

    @abstractmethod
    def found(self) -> list[str]:
        """The names of the models, valid or not."""

    def extent(self, name: str) -> Extent | None:
        """The extent of a model, None if there is none."""
        return self.extent_of(self.path(name))

    @abstractmethod
    def extent_of(self, path: Path) -> Extent | None:
        """The extent of a model at this path, None if there is none."""

    @abstractmethod
    async def digest(self, name: str) -> str:
        """`sha256:…` of the model. Raises OSError."""

    @abstractmethod
    def put(self, part: Path, name: str) -> None:
        """Move a complete model into its place, and replace one that is there. Raises OSError."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a model and then its record, which has no effect alone, if present. Raises OSError."""

    def tidy(self, name: str) -> None:  # noqa: B027  # a file is replaced by one rename
        """Repair what a crash during `put` or `remove` left. The caller holds the model's lock. Raises OSError."""

    def clash(self, name: str, existing: Iterable[str]) -> str:
        """Why a new model may not have this name besides the existing ones, "" if it may."""
        other = other_case(name, existing)
        if not other:
            return ""
        return f"{name!r} differs only by case from {other!r}, which is present. Use that name or another one."


class FileLayout(Layout):
    """Each model is one file, `<root>/<name><suffix>`, with its record beside it."""

    folders = False

    def __init__(self, root: Path, suffix: str) -> None:
        super().__init__(root)
        self.suffix = suffix

    def path(self, name: str) -> Path:
        """`<root>/<name><suffix>`."""
        return self.root / f"{name}{self.suffix}"

    def record(self, name: str) -> Path:
        """`<root>/<name>.json`."""
        return self.root / f"{name}.json"

    def found(self) -> list[str]:
        """From the files that end in the suffix."""
        try:
            entries = [entry.name for entry in self.root.iterdir() if entry.is_file()]
        except FileNotFoundError:
            return []
        return [entry.removesuffix(self.suffix) for entry in entries if entry.endswith(self.suffix)]

    def extent_of(self, path: Path) -> Extent | None:
        """One stat."""
        try:
            stat = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Extent(stat.st_size, stat.st_mtime_ns)

    async def digest(self, name: str) -> str:
        """The SHA-256 of the file."""
        return await sha256_of(self.path(name))

    def put(self, part: Path, name: str) -> None:
        """One rename."""
        part.replace(self.path(name))
        sync_folder(self.root)

    def remove(self, name: str) -> None:
        """Two files."""
        self.path(name).unlink(missing_ok=True)
        sync_folder(self.root)
        self.record(name).unlink(missing_ok=True)


def _shown(folder: Path) -> list[Path]:
    """The entries of a folder that are not hidden; [] if it is missing or may not be read."""
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


@dataclass(frozen=True, slots=True)
class Found:
    """A file that is copied: its stat, and its path below `root`, without links."""

    stat: os.stat_result
    path: Path
    root: Path

    @classmethod
    def at(cls, path: Path) -> Found:
        """The file at a path, wherever a link there leads. Raises OSError."""
        place = Path(os.path.realpath(path))
        return cls(place.stat(), place, place.parent)


def files_to_copy(folder: Path) -> dict[str, Found]:
    """The files of a folder outside the store, by their paths below it, with `/`.

    A link may lead to a file inside the folder; or, in a snapshot of huggingface_hub's cache, to the blobs beside it.
    Raises InvalidRequestError for any other link, and for a FIFO, a socket or a device; OSError.
    """
    root = Path(os.path.realpath(folder))
    roots = [root]
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        roots.append(Path(os.path.realpath(root.parent.parent / "blobs")))
    found: dict[str, Found] = {}
    for name, entry in entries_below(root):
        place = Path(os.path.realpath(entry.path))
        home = next((one for one in roots if place.is_relative_to(one)), None)
        if home is None:
            raise InvalidRequestError.at(
                "source",
                f"{name} in {str(folder)!r} is a link that leaves the folder. Replace it by the file itself, then "
                "pull again.",
            )
        stat = place.lstat()
        if S_ISREG(stat.st_mode):
            found[name] = Found(stat, place, home)
        elif not S_ISDIR(stat.st_mode):
            raise InvalidRequestError.at("source", f"{name} in {str(folder)!r} is not a regular file. Remove it.")
    return dict(sorted(found.items()))


def digest_of_files(digests: Mapping[str, str]) -> str:
    """The digest of a model (64 hex digits) from those of its files: SHA-256 of the sorted lines of `sha256sum`."""
    lines = sorted(f"{digest}  {path}\n" for path, digest in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fingerprint(stats: Mapping[str, os.stat_result]) -> str:
    """A text that identifies the state of a folder by the stats of its files."""
    lines = [f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in sorted(stats.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


async def digest_of_folder(folder: Path) -> str:
    """The digest of a model (64 hex digits). Reads all files. Raises OSError."""
    digests = {path: await sha256_of(folder / path) for path, _ in files_of(folder)}
    return digest_of_files({path: digest.removeprefix("sha256:") for path, digest in digests.items()})


def delete_tree(path: Path) -> None:
    """Delete a folder, a file, or a link without its target, if present. Raises OSError."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _extent(stats_of: Callable[[Path], list[os.stat_result]], folder: Path) -> Extent | None:
    """The extent of the files of a folder."""
    try:
        stats = stats_of(folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    if not stats:
        return None
    return Extent(sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats))


class FolderLayout(Layout):
    """Each model is one folder, `<root>/<name>` or `<root>/<owner>/<name>`."""

    folders = True

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._watched = WatchedFolders()

    def path(self, name: str) -> Path:
        """`<root>/<name>`."""
        return self.root.joinpath(*name.split("/"))

    def record(self, name: str) -> Path:
        """`<root>/.records/<name>.json`."""
        return self.root.joinpath(".records", *f"{name}.json".split("/"))

    def found(self) -> list[str]:
        """From the folders, two levels deep."""
        found: list[str] = []
        for folder in filter(Path.is_dir, _shown(self.root)):
            inside = _shown(folder)
            if any(entry.is_file() for entry in inside):
                found.append(folder.name)
            else:
                found += [f"{folder.name}/{entry.name}" for entry in inside if entry.is_dir() and _shown(entry)]
        return found

    def extent(self, name: str) -> Extent | None:
        """A stat for each file, some dozens: the bytes of all files and the latest modification time."""
        return _extent(self._watched.stats, self.path(name))

    def extent_of(self, path: Path) -> Extent | None:
        """As `extent`, for a folder that is looked at once."""
        return _extent(lambda folder: [stat for _, stat in files_of(folder)], path)

    async def digest(self, name: str) -> str:
        """As `digest_of_files`."""
        return f"sha256:{await digest_of_folder(self.path(name))}"

    def put(self, part: Path, name: str) -> None:
        """Rename the folder. An old model is renamed first, and renamed back if that fails."""
        target, old = self.path(name), self._aside(name, "old")
        private_folder(target.parent)
        delete_tree(old)
        taken = os.path.lexists(target)
        if taken and not _set_aside(target, old):
            delete_tree(target)
            taken = False
        try:
            part.rename(target)
        except OSError:
            if taken:
                old.rename(target)
            raise
        sync_folder(target.parent)
        delete_tree(old)

    def remove(self, name: str) -> None:
        """Rename the folder, then delete it; and its owner's folder, if it was the last one there."""
        target, gone = self.path(name), self._aside(name, "deleted")
        delete_tree(gone)
        if os.path.lexists(target):
            delete_tree(gone if _set_aside(target, gone) else target)
            sync_folder(target.parent)
        self.record(name).unlink(missing_ok=True)
        if "/" in name:
            for owner in (target.parent, self.record(name).parent):
                with suppress(OSError):  # another model is there
                    owner.rmdir()

    def tidy(self, name: str) -> None:
        """Put back a model that `put` had renamed, and delete what was to be deleted."""
        target, old = self.path(name), self._aside(name, "old")
        if os.path.lexists(old) and not os.path.lexists(target):
            private_folder(target.parent)
            old.rename(target)
        delete_tree(old)
        delete_tree(self._aside(name, "deleted"))

    def clash(self, name: str, existing: Iterable[str]) -> str:
        """As for files. An owner's name must differ from models' names, and from other owners' by more than case."""
        names = list(existing)
        owner, slash, _ = name.partition("/")
        for other in names:
            its_owner, its_slash, _ = other.partition("/")
            if its_owner.casefold() != owner.casefold():
                continue
            if bool(slash) != bool(its_slash):
                return f"{name!r} cannot exist besides {other!r}, which is present. Give another name."
            if slash and its_owner != owner:
                return f"{name!r} differs from {other!r} in the case of the owner. Write the owner as there."
        return super().clash(name, names)

    def _aside(self, name: str, what: str) -> Path:
        return self.partials / f"{name.replace('/', '=')}.{what}"


def _set_aside(folder: Path, place: Path) -> bool:
    """Rename a model's folder; False if the file system cannot, so that it must be deleted in place.

    overlayfs renames no folder that is in a lower layer, such as a model that came with a container's image.
    """
    try:
        folder.rename(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    sync_folder(folder.parent)
    return True


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
        await hash_rest(file, sha256, blob)
    return sha256.hexdigest(), blob.hexdigest()
