"""The base of all pulls, from a plan to an installed model, and the files that an interrupted pull leaves.

`.partial/<key>.files/<last part of the name>/` holds the complete files of a model in several files,
`.partial/<key>.arriving/` the others as partials (download/partial.py), `.partial/<key>.lock` keeps two processes
from pulling it at once; `=` in the key stands for the `/` of a name. All survive a restart of the plugin.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from engine_plugin import catalogue
from engine_plugin.download.disk import check_room, disk_error
from engine_plugin.download.events import Status, Success
from engine_plugin.download.fetch import Fetch, ProgressReport
from engine_plugin.download.partial import Partial
from engine_plugin.errors import (
    AuthError,
    DownloadError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    PullError,
)
from engine_plugin.models.index import Record
from engine_plugin.models.layout import delete_tree, files_of
from engine_plugin.system.files import BLOCK, in_thread, opened, private_folder, sync_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from engine_plugin.download.events import PullEvent
    from engine_plugin.download.remote import FetchPolicy
    from engine_plugin.download.source import HttpSource
    from engine_plugin.models.index import Index
    from engine_plugin.models.layout import Extent
    from engine_plugin.models.request import PullPlan, StoredSource

__all__ = ["Leftovers", "Pull", "Staging", "digests_of", "mismatch"]

_PULL_AGAIN = "What arrived was deleted; pull again, and correct the digest or the source if it stays so"


class Leftovers(Protocol):
    """What an interrupted pull left. `leftovers` and `discard` block."""

    def locked(self, waiting: Callable[[], None]) -> AbstractAsyncContextManager[None]:
        """Hold it; `waiting` is called once if another process holds it now."""

    def leftovers(self) -> bool:
        """Whether an interrupted pull left anything."""

    def discard(self) -> None:
        """Delete it."""


LeftT = TypeVar("LeftT", bound=Leftovers)


def mismatch(place: str, found: str, wanted: str, fix: str = _PULL_AGAIN) -> PullError:
    """The error for content whose SHA-256 (64 hex digits) is not the expected one."""
    return catalogue.CHECKSUM_MISMATCH.error_as(
        PullError, place=place, found=f"sha256:{found}", wanted=f"sha256:{wanted}", fix=fix
    )


class Pull(ABC, Generic[LeftT]):
    """One pull into a store. `run` is called once, and waits for another process that pulls the same name."""

    def __init__(
        self,
        plan: PullPlan,
        index: Index,
        policy: FetchPolicy,
        publish: Callable[[PullEvent], None],
        left: LeftT,
        reserved: Sequence[str] = (),
    ) -> None:
        """`left` is what an interrupted pull of the model left, which this one completes. `reserved` are names beyond
        the store's (samples) from which the model's must not differ by case only."""
        self._plan = plan
        self._index = index
        self._policy = policy
        self._publish = publish
        self._left = left
        self._reserved = reserved
        self._present: Record | None = None
        self._progress = ProgressReport(publish, plan.sha256)

    @abstractmethod
    async def _pull(self) -> Success:
        """Pull, while no other process pulls the model."""

    @property
    def _arrived(self) -> tuple[int, int]:
        """The bytes that have arrived, and the bytes of the model (0: unknown), for the message of a full disk."""
        return self._progress.completed, self._progress.total

    async def run(self) -> Success:
        """Pull the model. A later pull resumes a failed one if possible.

        Raises PullError, ModelNotFoundError, AuthError and InvalidRequestError.
        """
        plan = self._plan
        self._publish(Status(f"resolving {plan.name}"))
        try:
            await in_thread(private_folder, self._index.partials)
            async with self._left.locked(
                lambda: self._publish(Status(f"waiting for another process that pulls {plan.name}"))
            ):
                await self._refuse_clash()
                self._present = await self._index.get(plan.name)
                return await self._pull()
        except OSError as error:
            told = disk_error(error, self._index.root, *self._arrived)
            kept = await in_thread(self._left.leftovers)
            raise PullError.retold(told, f"{told}. Deleting the model removes it" if kept else "") from error
        except PullError:
            raise
        except DownloadError as error:
            raise PullError.retold(error) from error
        except AuthError as error:
            raise catalogue.HUB_ACCESS_REFUSED.error(said=str(error).rstrip(".")) from error
        except NotFoundError as error:
            raise ModelNotFoundError.retold(error) from error

    async def _refuse_clash(self) -> None:
        names = [*await in_thread(self._index.names), *self._reserved]
        if clash := self._index.layout.clash(self._plan.name, names):
            raise InvalidRequestError.at("model", clash)

    async def _already(self) -> Success:
        """Keep the present model, which is the requested one, and delete what an interrupted pull left."""
        if self._present is None:
            raise LookupError(f"{self._plan.name} is not present")
        await in_thread(self._left.discard)
        record = await self._index.set_kind(self._present, self._plan.kind)
        return Success(record.name, record.size, record.digest)

    def _is_digest(self, sha256: str) -> bool:
        """Whether the present model has that digest (64 hex digits)."""
        return self._present is not None and self._present.digest == f"sha256:{sha256}"

    def _changed(self) -> PullError:
        return PullError(f"{self._plan.source.label}: changed during the copy. Pull again when it is complete.")

    def _is_from_here(self, validator: str) -> bool:
        """Whether the present model is the version of this source that `validator` identifies."""
        present = self._present
        return (
            present is not None
            and bool(validator)
            and (present.source, present.validator) == (self._plan.source.label, validator)
        )

    async def _expect(self, staging: Staging, kept: int, total: int, spare: int = 0) -> None:
        """Begin the progress of several files, `kept` of `total` bytes of which are complete.

        Raises DownloadError unless the other bytes and `spare` more fit on the disk.
        """
        here = await in_thread(staging.here)
        await in_thread(check_room, self._index.partials, max(total + spare - kept - here, 0))
        self._progress.begin(kept, total)

    async def _fetch_into(self, partial: Partial, source: HttpSource, size: int, sha256: str = "") -> Fetch:
        """Download one of several files, whose bytes (0: unknown) and digest ("": unknown) are given."""
        fetch = Fetch(
            source,
            partial,
            self._progress,
            sha256=sha256,
            size=size,
            limit=size,
            insecure=self._plan.insecure,
            policy=self._policy,
        )
        async with partial.opened():
            await fetch.run()
            await in_thread(partial.sync)
        return fetch

    async def _install(self, part: Path, size: int, digest: str, validator: str) -> Success:
        """Inspect a complete and verified model and move it into its place. `digest` is 64 hex digits."""
        plan, present = self._plan, self._present
        self._publish(Status("inspecting the model"))
        try:
            found = await self._index.inspect(part)
        except (InvalidRequestError, PullError) as error:
            await in_thread(self._left.discard)
            raise PullError(f"{plan.source.label}: not a usable model: {error}") from error
        record = await self._index.put(
            part,
            Record(
                name=plan.name,
                kind=plan.kind or found.kind,
                size=size,
                mtime_ns=0,
                digest=f"sha256:{digest}",
                source=plan.source.label,
                validator=validator,
                pulled_at=datetime.now(UTC).isoformat(),
                kind_given=bool(plan.kind),
                references=present.references if present and present.source == plan.source.label else (),
                details=found.details,
            ),
        )
        return Success(record.name, record.size, record.digest)

    async def _share(self, source: StoredSource, part: Path, extent: Extent | None) -> Success:
        """Install hard links to the files of another model of the store."""
        if extent is None or not source.record.describes(extent):
            await in_thread(self._left.discard)
            raise self._changed()
        self._publish(Status(f"copying {source.label}"))
        old = source.record
        kind = self._plan.kind or old.kind
        record = await self._index.put(
            part,
            replace(
                old,
                name=self._plan.name,
                kind=kind,
                kind_given=old.kind_given or kind != old.kind,
                source=source.label,
                validator=old.digest,
                pulled_at=datetime.now(UTC).isoformat(),
                references=(),
            ),
        )
        return Success(record.name, record.size, record.digest)


class Staging:
    """The files of an incomplete model in several files. Its methods block: call them in a thread."""

    def __init__(self, folder: Path, name: str) -> None:
        key = name.replace("/", "=")
        self._lock = Partial(folder, key)
        self._whole = folder / f"{key}.files"
        self._arriving = folder / f"{key}.arriving"
        self.files = self._whole / name.rpartition("/")[2]
        """The folder that becomes the model; it has its name."""

    def locked(self, waiting: Callable[[], None]) -> AbstractAsyncContextManager[None]:
        """Lock it against other processes; `waiting` is called once if another process holds the lock."""
        return self._lock.locked(waiting)

    def leftovers(self) -> bool:
        """Whether an interrupted pull left anything."""
        return self._whole.exists() or self._arriving.exists()

    def discard(self) -> None:
        """Delete all that arrived."""
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


async def digests_of(path: Path) -> tuple[int, str, str]:
    """The size of a file, its SHA-256, and the SHA-1 of its git blob, in hex. Raises OSError."""
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
