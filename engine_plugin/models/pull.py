"""The base of all pulls, from a plan to an installed model, and the copies of models on this machine."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.download.disk import check_room, disk_error
from engine_plugin.download.events import StepStarted, Success
from engine_plugin.download.fetch import Fetch, ProgressReport
from engine_plugin.errors import (
    AuthError,
    DownloadError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    PullError,
)
from engine_plugin.models.hubs import RemoteFile, checked_files
from engine_plugin.models.index import Record
from engine_plugin.models.layout import (
    Found,
    Staging,
    digest_of_files,
    digests_of,
    files_of,
    files_to_copy,
    fingerprint,
)
from engine_plugin.models.request import LocalSource, StoredSource
from engine_plugin.system.files import BLOCK, in_thread, opened, private_folder
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from io import FileIO
    from pathlib import Path

    from engine_plugin.download.events import PullEvent
    from engine_plugin.download.partial import Partial
    from engine_plugin.download.remote import FetchPolicy
    from engine_plugin.download.source import HttpSource
    from engine_plugin.models.hubs import Hub
    from engine_plugin.models.index import Index
    from engine_plugin.models.request import PullPlan

    Choose = Callable[[Sequence[str]], Sequence[str]]
    """Returns those of the paths in a folder that an engine needs. Raises PullError for a folder without a model."""

__all__ = ["Choose", "CopyPull", "Pull"]

_REPLACED = frozenset({errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EINVAL, errno.EMLINK, errno.ENXIO})
"""The errors of opening a file that has vanished, or that a link or something else has replaced."""


@dataclass(eq=False)
class Pull(ABC):
    """One pull into a store, from one kind of source. `run` is called once, and waits for another process that pulls
    the same name."""

    plan: PullPlan
    index: Index
    policy: FetchPolicy
    publish: Callable[[PullEvent], None]
    reserved: Sequence[str]
    """Names beyond the store's (samples) from which the model's must not differ by case only."""
    choose: Choose
    hubs: Mapping[str, Hub]

    def __post_init__(self) -> None:
        self.source = self.plan.source
        self.left = Staging(self.index.partials, self.plan.name)
        self.present: Record | None = None
        self.progress = ProgressReport(self.publish, self.plan.sha256)

    @abstractmethod
    async def _pull(self) -> Success:
        """Pull, while no other process pulls the model."""

    async def run(self) -> Success:
        """Pull the model. A later pull resumes a failed one if possible.

        Raises PullError, ModelNotFoundError, AuthError and InvalidRequestError.
        """
        name = self.plan.name
        self.publish(StepStarted(f"resolving {name}"))
        try:
            await in_thread(private_folder, self.index.partials)
            async with self.left.locked(
                lambda: self.publish(StepStarted(f"waiting for another process that pulls {name}"))
            ):
                return await self._pull_locked()
        except OSError as error:
            reason = disk_error(error, self.index.root, self.progress.completed, self.progress.total)
            kept = await in_thread(self.left.leftovers)
            raise PullError.from_error(reason, f"{reason}. Deleting the model removes it" if kept else "") from error
        except PullError:
            raise
        except DownloadError as error:
            raise PullError.from_error(error) from error
        except AuthError as error:
            raise catalogue.HUB_ACCESS_REFUSED.error(said=str(error).rstrip(".")) from error
        except NotFoundError as error:
            raise ModelNotFoundError.from_error(error) from error

    async def _pull_locked(self) -> Success:
        name, layout = self.plan.name, self.index.layout
        names = [*await in_thread(self.index.names), *self.reserved]
        if clash := layout.clash(name, names):
            raise InvalidRequestError.at("model", clash)
        await in_thread(layout.tidy, name)
        self.present = await self.index.get(name)
        if self._is_digest(self.plan.sha256):
            return await self._already()
        try:
            return await self._pull()
        finally:
            await in_thread(self.left.sweep)

    async def _already(self) -> Success:
        """Keep the present model, which is the requested one, and delete what an interrupted pull left."""
        if self.present is None:
            raise LookupError(f"{self.plan.name} is not present")
        await in_thread(self.left.discard)
        record = await self.index.set_kind(self.present, self.plan.kind)
        return Success(record.name, record.size, record.digest)

    def _is_digest(self, sha256: str) -> bool:
        """Whether the present model has that digest (64 hex digits)."""
        return self.present is not None and self.present.digest == f"sha256:{sha256}"

    def _is_from_here(self, validator: str) -> bool:
        """Whether the present model is the version of this source that `validator` identifies."""
        present = self.present
        return (
            present is not None
            and bool(validator)
            and (present.source, present.validator) == (self.source.label, validator)
        )

    def _changed(self, place: object) -> PullError:
        return PullError(f"{place}: changed during the copy. Pull again when it is complete.")

    def _chosen(self, paths: Sequence[str]) -> Sequence[str]:
        """Those of the paths in a folder that the engine needs."""
        try:
            return self.choose(paths)
        except (InvalidRequestError, PullError) as error:
            raise PullError(f"{self.source.label}: {error}") from error

    # Files that arrive

    async def _append(self, partial: Partial, file: FileIO, total: int) -> None:
        """Append the rest of an open file to a partial, which will have `total` bytes."""
        while block := await in_thread(file.read, BLOCK):
            try:
                await in_thread(partial.write, block)
            finally:
                self.progress.at(partial.size, total)

    async def _keep(self, files: Sequence[RemoteFile], *, by_size: bool = False) -> dict[str, str]:
        """The SHA-256 of each complete file in the staging that is the listed one. Deletes the others.

        A file that is listed without a digest is kept only `by_size`.
        """
        here = await in_thread(self.left.prepare, [file.path for file in files])
        if here:
            self.publish(StepStarted("checking the files of an earlier download"))
        digests = {}
        for file in files:
            if file.path not in here:
                continue
            staged = self.left.files / file.path
            sha256, blob = await digests_of(staged)
            same_size = by_size and not file.has_digest and here[file.path] == file.size
            if same_size or sha256 == file.sha256 or blob == file.blob:
                digests[file.path] = sha256
            else:
                await in_thread(staged.unlink)
        return digests

    async def _expect(self, kept: int, total: int, spare: int = 0) -> None:
        """Begin the progress of several files, `kept` of `total` bytes of which are complete.

        Raises DownloadError unless the other bytes and `spare` more fit on the disk.
        """
        here = await in_thread(self.left.here)
        await in_thread(check_room, self.index.partials, max(total + spare - kept - here, 0))
        self.progress.begin(kept, total)

    async def _fetch_listed(self, source: HttpSource, file: RemoteFile, lister: str) -> str:
        """Download one of several files, which a hub or a server (`lister`) lists, into the staging.

        Returns its SHA-256. Raises DownloadError for another file than the listed one.
        """
        partial = self.left.arriving(file.path)
        policy, insecure = self.policy, self.plan.insecure
        await Fetch(source, partial, self.progress, policy, insecure, wanted=file.sha256, size=file.size).run()
        return await self._accept(partial, file, lister)

    async def _accept(self, partial: Partial, file: RemoteFile, lister: str) -> str:
        """Move a complete partial to the complete files of the staging.

        Returns its SHA-256. Raises DownloadError for another file than the listed one.
        """
        digest = partial.hexdigest()
        found, wanted = f"sha256:{digest}", f"sha256:{file.sha256 or digest}"
        if file.blob:
            found, wanted = f"git:{(await digests_of(partial.path))[1]}", f"git:{file.blob}"
        if found != wanted:
            await in_thread(partial.discard)
            raise catalogue.CHECKSUM_MISMATCH.error(
                place=f"{self.source.label}: {file.path} differs from the file that the {lister} lists",
                found=found,
                wanted=wanted,
                fix="What arrived was deleted. Pull again; if it stays so, the source or a proxy changes files",
            )
        await in_thread(self.left.arrived, partial, file.path)
        self.progress.file_done(partial.size)
        return digest

    # The complete model

    async def _finish(self, digests: Mapping[str, str], size: int, validator: str) -> Success:
        """Install the files in the staging, with these digests, as a folder or as the one file that a model is."""
        await in_thread(self.left.sync)
        self.publish(StepStarted(f"verifying {byte_size(size)}"))
        digest = digest_of_files(digests) if self.index.layout.folders else next(iter(digests.values()))
        return await self._install(self._part(digests), size, digest, validator)

    def _part(self, paths: Iterable[str]) -> Path:
        """The complete model in the staging: the folder, or the one file."""
        return self.left.files if self.index.layout.folders else self.left.files / next(iter(paths))

    async def _install(self, part: Path, size: int, digest: str, validator: str, wanted: str = "") -> Success:
        """Inspect a complete model and move it into its place.

        `digest` is 64 hex digits, and so is the one that is `wanted` (by default that of the plan), if known.
        """
        plan, present, wanted = self.plan, self.present, wanted or self.plan.sha256
        place = f"{self.source.label}: the {'model' if self.index.layout.folders else 'file'}"
        if not size:
            raise PullError(f"{place} is empty.")
        if wanted and digest != wanted:
            await in_thread(self.left.discard)
            raise catalogue.CHECKSUM_MISMATCH.error(
                place=place,
                found=f"sha256:{digest}",
                wanted=f"sha256:{wanted}",
                fix="What arrived was deleted; pull again, and correct the digest or the source if it stays so",
            )
        self.publish(StepStarted("inspecting the model"))
        try:
            found = await self.index.inspect(part)
        except (InvalidRequestError, PullError) as error:
            await in_thread(self.left.discard)
            raise PullError(f"{self.source.label}: not a usable model: {error}") from error
        record = Record(
            name=plan.name,
            kind=plan.kind or found.kind,
            size=size,
            mtime_ns=0,
            digest=f"sha256:{digest}",
            source=self.source.label,
            validator=validator,
            pulled_at=datetime.now(UTC).isoformat(),
            kind_given=bool(plan.kind),
            references=present.references if present and present.source == self.source.label else (),
            details=found.details,
        )
        return await self._put(part, record)

    async def _put(self, part: Path, record: Record) -> Success:
        record = await self.index.put(part, record)
        return Success(record.name, record.size, record.digest)


class CopyPull(Pull):
    """A copy of a model that is a file or a folder on this machine."""

    source: LocalSource

    async def _pull(self) -> Success:
        source = self.source
        await in_thread(self.left.discard)  # a copy is quick: it always begins anew
        try:
            found = await in_thread(self._found)
        except OSError as error:
            raise PullError(f"{source.label}: cannot be read ({error.strerror}).") from error
        if self.present is not None and self.index.path(self.plan.name).samefile(source.path):
            return await self._already()
        try:
            if isinstance(source, StoredSource) and await in_thread(self._link, found):
                return await self._share(source, found)
            return await self._copy(found)
        except BaseException:
            await in_thread(self.left.discard)
            raise

    def _found(self) -> dict[str, Found]:
        """The files to copy, by their paths in the model.

        Links are followed anywhere in the package and the store only, and where the model is one file.
        """
        source, name = self.source, self.index.path(self.plan.name).name
        if not self.index.layout.folders:
            return {name: Found.at(source.path)}
        if source.sample is None and not isinstance(source, StoredSource):
            found = files_to_copy(source.path)
        else:
            found = {path: Found.at(source.path / path) for path, _ in files_of(source.path)}
        paths = found if isinstance(source, StoredSource) else self._chosen(list(found))
        return {path: found[path] for path in paths}

    def _link(self, found: Mapping[str, Found]) -> bool:
        """Hard-link the files; False where the file system cannot."""
        self.left.prepare(())
        try:
            for path, file in found.items():
                os.link(file.path, self.left.place(path))
        except OSError:
            self.left.discard()
            return False
        self.left.sync()
        return True

    async def _share(self, source: StoredSource, found: Mapping[str, Found]) -> Success:
        """Install the hard links to the files of another model of the store."""
        old, part = source.record, self._part(found)
        extent = self.index.layout.extent_of(part)
        if extent is None or not old.describes(extent):
            raise self._changed(source.label)
        self.publish(StepStarted(f"copying {source.label}"))
        kind = self.plan.kind or old.kind
        record = replace(
            old,
            name=self.plan.name,
            kind=kind,
            kind_given=old.kind_given or kind != old.kind,
            source=source.label,
            validator=old.digest,
            pulled_at=datetime.now(UTC).isoformat(),
            references=(),
        )
        return await self._put(part, record)

    async def _copy(self, found: Mapping[str, Found]) -> Success:
        label = self.source.label
        checked_files([RemoteFile(path, file.stat.st_size) for path, file in found.items()], label)
        validator = fingerprint({path: file.stat for path, file in found.items()})
        if self._is_from_here(validator):
            return await self._already()
        size = sum(file.stat.st_size for file in found.values())
        await in_thread(check_room, self.index.partials, size)
        await in_thread(self.left.prepare, found)
        self.publish(StepStarted(f"copying {label}"))
        if self.index.layout.folders:
            self.progress.begin(0, size)
        digests = {path: await self._copy_file(path, file) for path, file in found.items()}
        return await self._finish(digests, size, validator)

    async def _copy_file(self, path: str, found: Found) -> str:
        """Copy one file into the staging. Its SHA-256."""
        partial, before = self.left.arriving(path), found.stat
        below = found.root if self.index.layout.folders else None  # the folder of one file may not be readable
        async with partial.opened():
            try:
                async with opened(found.path, below) as file:
                    await self._append(partial, file, before.st_size)
                after = await in_thread(found.path.lstat)
            except PermissionError as error:
                raise PullError(f"{found.path}: cannot be read ({error.strerror}).") from error
            except OSError as error:
                if error.errno not in _REPLACED:
                    raise
                raise PullError(f"{found.path}: replaced during the copy. Pull again.") from error
            await in_thread(partial.sync)
        if (after.st_mtime_ns, partial.size) != (before.st_mtime_ns, before.st_size):
            raise self._changed(found.path)
        self.progress.file_done(partial.size)
        await in_thread(self.left.arrived, partial, path)
        return partial.hexdigest()
