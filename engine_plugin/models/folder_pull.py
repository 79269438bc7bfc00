"""A pull of a model that is a folder: from a repository on a hub, or from a folder on this machine."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.download.disk import check_room
from engine_plugin.download.events import Status
from engine_plugin.errors import InvalidRequestError, PullError
from engine_plugin.models.hubs import RemoteFile, RepositorySource, checked_files
from engine_plugin.models.layout import (
    Found,
    digest_of_files,
    extent_of_folder,
    files_of,
    files_to_copy,
    fingerprint,
)
from engine_plugin.models.pull import Pull, Staging, digests_of, mismatch
from engine_plugin.models.request import LocalSource, StoredSource
from engine_plugin.system.files import BLOCK, in_thread, opened
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engine_plugin.download.events import PullEvent, Success
    from engine_plugin.download.partial import Partial
    from engine_plugin.download.remote import FetchPolicy
    from engine_plugin.models.hubs import Hub
    from engine_plugin.models.index import Index
    from engine_plugin.models.request import PullPlan

    Choose = Callable[[Sequence[str]], Sequence[str]]
    """Returns those of the paths in a folder that an engine needs. Raises PullError for a folder without a model."""

__all__ = ["Choose", "FolderPull"]

_REPLACED = frozenset({errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EINVAL, errno.EMLINK, errno.ENXIO})
"""The errors of opening a file that has vanished, or that a link or something else has replaced."""


class FolderPull(Pull[Staging]):
    """A pull of a model that is a folder."""

    def __init__(
        self,
        plan: PullPlan,
        index: Index,
        policy: FetchPolicy,
        publish: Callable[[PullEvent], None],
        left: Staging,
        reserved: Sequence[str],
        *,
        hubs: Mapping[str, Hub],
        choose: Choose,
    ) -> None:
        super().__init__(plan, index, policy, publish, left, reserved)
        self._hubs = hubs
        self._choose = choose
        self._bytes = 0

    async def _pull(self) -> Success:
        plan, staging = self._plan, self._left
        if self._present is None:
            await in_thread(self._index.layout.tidy, plan.name)
            self._present = await self._index.get(plan.name)
        if self._is_digest(plan.sha256):
            return await self._already()
        try:
            if isinstance(plan.source, RepositorySource):
                return await self._fetch(plan.source)
            if isinstance(plan.source, LocalSource):
                await in_thread(staging.discard)  # a copy is quick: it always begins anew
                if isinstance(plan.source, StoredSource) and await in_thread(self._link, plan.source):
                    return await self._share(plan.source, staging.files, extent_of_folder(staging.files))
                return await self._copy(plan.source)
            raise TypeError(f"{plan.source.label} is not a folder")
        finally:
            await in_thread(staging.sweep)

    async def _fetch(self, source: RepositorySource) -> Success:
        hub = self._hubs[source.hub]
        self._publish(Status(f"asking {hub.title} for {source.repository}"))
        listing = await hub.listing(source, self._publish, insecure=self._plan.insecure)
        if self._is_from_here(listing.commit):
            return await self._already()
        by_path = {file.path: file for file in listing.files}
        files = checked_files([by_path[path] for path in self._chosen(list(by_path))], source.label)
        self._bytes = sum(file.size for file in files)
        digests = await self._keep(files)
        kept = sum(by_path[path].size for path in digests)
        await self._expect(self._left, kept, self._bytes)
        for file in files:
            if file.path not in digests:
                digests[file.path] = await self._fetch_file(hub, source, listing.commit, file)
                self._progress.file_done(file.size)
        return await self._finish(digests, listing.commit)

    def _chosen(self, paths: list[str]) -> Sequence[str]:
        try:
            return self._choose(paths)
        except (InvalidRequestError, PullError) as error:
            raise PullError(f"{self._plan.source.label}: {error}") from error

    async def _keep(self, files: Sequence[RemoteFile]) -> dict[str, str]:
        """The SHA-256 of each file that an interrupted pull completed, or that the present model has."""
        sizes = await in_thread(self._left.prepare, [file.path for file in files])
        if sizes:
            self._publish(Status("checking the files of an earlier download"))
        digests = {}
        for file in files:
            staged = self._left.files / file.path
            if file.path not in sizes and not await in_thread(self._adopt, file, staged):
                continue
            digest = await _verified(staged, file)
            if digest:
                digests[file.path] = digest
            else:
                await in_thread(staged.unlink)
        return digests

    def _adopt(self, file: RemoteFile, staged: Path) -> bool:
        """Link or copy a file from the present model, if it has one of this size."""
        present = self._index.path(self._plan.name) / file.path
        if not (file.sha256 or file.blob) or not present.is_file() or present.stat().st_size != file.size:
            return False
        self._left.place(file.path)
        try:
            os.link(present, staged)
        except OSError:
            shutil.copyfile(present, staged)
            staged.chmod(0o600)
        return True

    async def _fetch_file(self, hub: Hub, source: RepositorySource, commit: str, file: RemoteFile) -> str:
        partial = self._left.arriving(file.path)
        if file.size:
            place = hub.file_source(source, commit, file.path)
            await self._fetch_into(partial, place, file.size, file.sha256)
        else:
            await in_thread(partial.path.touch, 0o600)
        digest = await _verified(partial.path, file)
        if not digest:
            await in_thread(partial.discard)
            raise PullError(
                f"{source.label}: {file.path} differs from the file that the hub lists. It was deleted. Pull again; "
                "if the error persists, the hub or a proxy changes files."
            )
        await in_thread(self._left.arrived, partial, file.path)
        return digest

    def _link(self, source: StoredSource) -> bool:
        """Hard-link the other model's files; False where the file system cannot."""
        self._left.prepare(())
        try:
            for path, _ in files_of(source.path):
                os.link(os.path.realpath(source.path / path), self._left.place(path))
        except OSError:
            self._left.discard()
            return False
        self._left.sync()
        return True

    async def _copy(self, source: LocalSource) -> Success:
        if self._present is not None and self._index.path(self._plan.name).samefile(source.path):
            return await self._already()
        try:
            found = await in_thread(_files_at, source)
        except OSError as error:
            raise PullError(f"{source.label}: cannot be read ({error.strerror}).") from error
        paths = list(found) if isinstance(source, StoredSource) else self._chosen(list(found))
        checked_files([RemoteFile(path, found[path].stat.st_size) for path in paths], source.label)
        validator = fingerprint({path: found[path].stat for path in paths})
        if self._is_from_here(validator):
            return await self._already()
        self._bytes = sum(found[path].stat.st_size for path in paths)
        await in_thread(check_room, self._index.partials, self._bytes)
        await in_thread(self._left.prepare, paths)
        self._publish(Status(f"copying {source.label}"))
        self._progress.begin(0, self._bytes)
        try:
            digests = {path: await self._copy_file(path, found[path]) for path in paths}
        except BaseException:
            await in_thread(self._left.discard)
            raise
        return await self._finish(digests, validator)

    async def _copy_file(self, path: str, found: Found) -> str:
        partial = self._left.arriving(path)
        async with partial.opened():
            try:
                await self._copy_blocks(found, partial)
                after = await in_thread(found.path.lstat)
            except OSError as error:
                if error.errno not in _REPLACED:
                    raise
                raise PullError(f"{found.path}: replaced during the copy. Pull again.") from error
            await in_thread(partial.sync)
        before = found.stat
        if (after.st_mtime_ns, partial.size) != (before.st_mtime_ns, before.st_size):
            raise PullError(f"{found.path}: changed during the copy. Pull again when it is complete.")
        self._progress.file_done(partial.size)
        await in_thread(self._left.arrived, partial, path)
        return partial.hexdigest()

    async def _copy_blocks(self, found: Found, partial: Partial) -> None:
        async with opened(found.path, found.root) as file:
            while block := await in_thread(file.read, BLOCK):
                await in_thread(partial.write, block)
                self._progress.at(partial.size, found.stat.st_size)

    async def _finish(self, digests: Mapping[str, str], validator: str) -> Success:
        plan, staging = self._plan, self._left
        self._publish(Status(f"verifying {len(digests)} files, {byte_size(self._bytes)}"))
        digest = digest_of_files(digests)
        if plan.sha256 and digest != plan.sha256:
            await in_thread(staging.discard)
            raise mismatch(f"{plan.source.label}: the model", digest, plan.sha256)
        await in_thread(staging.sync)
        return await self._install(staging.files, self._bytes, digest, validator)


def _files_at(source: LocalSource) -> dict[str, Found]:
    """The files of a source. Links are followed anywhere in the package and the store only."""
    if source.sample is None and not isinstance(source, StoredSource):
        return files_to_copy(source.path)
    return {
        path: Found(stat, place, place.parent)
        for path, stat in files_of(source.path)
        for place in [Path(os.path.realpath(source.path / path))]
    }


async def _verified(path: Path, file: RemoteFile) -> str:
    """The SHA-256 of a file if it is the listed one, else ""."""
    size, sha256, blob = await digests_of(path)
    fits = size == file.size and file.sha256 in {"", sha256} and file.blob in {"", blob}
    return sha256 if fits else ""
