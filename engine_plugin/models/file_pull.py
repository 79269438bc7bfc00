"""Pulls of a model that becomes one file: from a file or URL, or from all parts of a GGUF model, which are joined."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from engine_plugin.download.disk import check_room
from engine_plugin.download.events import Status
from engine_plugin.download.fetch import Fetch
from engine_plugin.download.partial import Partial
from engine_plugin.download.remote import http_client, open_url
from engine_plugin.download.source import HttpSource
from engine_plugin.errors import NotFoundError, PullError
from engine_plugin.models.gguf import GgufError, join
from engine_plugin.models.hubs import patiently
from engine_plugin.models.layout import Extent, fingerprint
from engine_plugin.models.pull import Pull, Staging, digests_of, mismatch
from engine_plugin.models.request import LocalSource, PartsSource, StoredSource
from engine_plugin.system.files import BLOCK, in_thread, opened
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from io import FileIO
    from pathlib import Path

    import httpx

    from engine_plugin.download.events import Success
    from engine_plugin.download.remote import Remote
    from engine_plugin.models.gguf import Joined

__all__ = ["FileLeftovers", "FilePull", "PartsPull"]


class FileLeftovers:
    """What interrupted pulls of a model left: the incomplete file, and parts of it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.file = Partial(folder, name)
        self.parts = Staging(folder, name)

    def locked(self, waiting: Callable[[], None]) -> AbstractAsyncContextManager[None]:
        """Hold them against other processes; `waiting` is called once if another process holds them now."""
        return self.file.locked(waiting)

    def leftovers(self) -> bool:
        """Whether there are any."""
        return self.file.leftovers() or self.parts.leftovers()

    def discard(self) -> None:
        """Delete all of them."""
        self.file.discard()
        self.parts.discard()


class FilePull(Pull[FileLeftovers]):
    """A pull of a model that is one file at its source."""

    @property
    def _arrived(self) -> tuple[int, int]:
        return self._left.file.size, self._left.file.state.total

    async def _pull(self) -> Success:
        source, partial = self._plan.source, self._left.file
        if self._is_digest(self._plan.sha256):
            return await self._already()
        if not isinstance(source, HttpSource):
            await in_thread(partial.discard)  # a copy is quick: it always begins anew
        if isinstance(source, StoredSource) and await in_thread(self._link, source):
            return await self._share(source, partial.path, Extent.of(partial.path.stat()))
        async with self._opened(partial, keep=isinstance(source, HttpSource)):
            fill = self._copy if isinstance(source, LocalSource) else self._fetch
            arrived = await fill()
        if arrived is None:
            return await self._already()
        return await self._verify(*arrived)

    @asynccontextmanager
    async def _opened(self, partial: Partial, *, keep: bool) -> AsyncIterator[None]:
        """Open the partial and sync it in the end. An empty one is deleted, and one that failed unless `keep`."""
        try:
            async with partial.opened():
                yield
                await in_thread(partial.sync)
        except BaseException:
            if not keep:
                await in_thread(partial.discard)
            raise
        finally:
            if not partial.size:
                await in_thread(partial.discard)

    async def _fetch(self) -> tuple[str, str] | None:
        """Fill the partial. The digest that it must have ("" unknown) and its version's validator; None where this
        version of the file is present."""
        source = self._plan.source
        if not isinstance(source, HttpSource):
            raise TypeError(f"{source.label} is not a file")
        fetch = Fetch(
            source,
            self._left.file,
            self._progress,
            sha256=self._plan.sha256,
            insecure=self._plan.insecure,
            policy=self._policy,
            present=self._is_present,
        )
        return (fetch.sha256, fetch.validator) if await fetch.run() else None

    def _is_present(self, remote: Remote) -> bool:
        if self._plan.sha256 or self._present is None:
            return False
        if remote.sha256:
            return self._is_digest(remote.sha256)
        return self._same_version(remote.validator, remote.total)

    def _same_version(self, validator: str, size: int) -> bool:
        return self._present is not None and self._present.size == size and self._is_from_here(validator)

    def _link(self, source: StoredSource) -> bool:
        """Hard-link the other model's file; False where the file system cannot."""
        try:
            os.link(os.path.realpath(source.path), self._left.file.path)
        except OSError:
            return False
        return True

    async def _copy(self) -> tuple[str, str] | None:
        """As `_fetch`, from a local file."""
        source = self._plan.source
        if not isinstance(source, LocalSource):
            raise TypeError(f"{source.label} is not a local file")
        async with AsyncExitStack() as stack:
            try:
                file = await stack.enter_async_context(opened(source.path))
            except OSError as error:
                raise PullError(f"{source.label}: cannot be read ({error.strerror}).") from error
            return await self._copy_from(file, source)

    async def _copy_from(self, file: FileIO, source: LocalSource) -> tuple[str, str] | None:
        partial, before = self._left.file, source.path.stat()
        validator = f"mtime {before.st_mtime_ns}"
        if self._present is not None:
            target = self._index.path(self._plan.name)
            if target.samefile(source.path) or self._same_version(validator, before.st_size):
                return None
        await in_thread(check_room, partial.folder, before.st_size)
        self._publish(Status(f"copying {source.label}"))
        await self._append(file, before.st_size)
        self._progress.at(partial.size, before.st_size, last=True)
        after = source.path.stat()
        if (after.st_mtime_ns, after.st_size) != (before.st_mtime_ns, partial.size):
            raise self._changed()
        return self._plan.sha256, validator

    async def _append(self, file: FileIO, total: int) -> None:
        """Append the rest of an open file to the partial."""
        partial = self._left.file
        while block := await in_thread(file.read, BLOCK):
            await in_thread(partial.write, block)
            self._progress.at(partial.size, total)

    async def _verify(self, sha256: str, validator: str) -> Success:
        partial, label = self._left.file, self._plan.source.label
        if not partial.size:
            raise PullError(f"{label}: the file is empty.")
        self._publish(Status("verifying sha256"))
        digest = partial.hexdigest()
        if sha256 and digest != sha256:
            await in_thread(partial.discard)
            raise mismatch(f"{label}: the file", digest, sha256)
        success = await self._install(partial.path, partial.size, digest, validator)
        await in_thread(partial.forget)
        return success


class PartsPull(FilePull):
    """A pull of a GGUF model that is in parts at its source."""

    @property
    def _arrived(self) -> tuple[int, int]:
        return self._left.file.size or self._progress.completed, self._progress.total

    async def _pull(self) -> Success:
        if not isinstance(self._plan.source, PartsSource):
            raise TypeError(f"{self._plan.source.label} is not in parts")
        remote = [part for part in self._plan.source.parts if isinstance(part, HttpSource)]
        local = [part.path for part in self._plan.source.parts if not isinstance(part, HttpSource)]
        await in_thread(self._left.file.discard)
        try:
            return await (self._fetch_all(remote) if remote else self._copy_all(local))
        finally:
            await in_thread(self._left.file.discard)  # the installed file has left it
            await in_thread(self._left.parts.sweep)

    async def _copy_all(self, paths: Sequence[Path]) -> Success:
        before = await in_thread(_version, paths)
        if self._is_from_here(before):
            return await self._already()
        joined = await self._planned(paths)
        await in_thread(check_room, self._index.partials, joined.size)
        await self._join(joined, paths)
        if await in_thread(_version, paths) != before:
            raise self._changed()
        return await self._finish(before)

    async def _fetch_all(self, parts: Sequence[HttpSource]) -> Success:
        client = await in_thread(http_client, self._policy, insecure=self._plan.insecure)
        async with client:
            heads = [await self._head(client, parts, number) for number in range(len(parts))]
        known = [head.sha256 or head.validator for head in heads]
        validator = " ".join(known) if all(known) else ""
        if self._is_from_here(validator):
            return await self._already()
        names = [part.file_name for part in parts]
        complete = await self._keep(dict(zip(names, heads, strict=True)))
        sizes = dict(zip(names, (head.total for head in heads), strict=True))
        # A part is deleted when it has been joined, so that the disk never holds more than one of them twice.
        kept = sum(sizes[name] for name in complete)
        await self._expect(self._left.parts, kept, sum(sizes.values()), spare=max(sizes.values()))
        for part, head in zip(parts, heads, strict=True):
            if part.file_name not in complete:
                await self._fetch_part(part, head)
        paths = [self._left.parts.files / name for name in names]
        await self._join(await self._planned(paths), paths, consume=True)
        return await self._finish(validator)

    async def _head(self, client: httpx.AsyncClient, parts: Sequence[HttpSource], number: int) -> Remote:
        """What the server says of a part, before any of them is fetched."""

        async def ask() -> Remote:
            async with open_url(
                client, parts[number], {}, policy=self._policy, insecure=self._plan.insecure
            ) as answer:
                answer.check_status()
                return answer.remote()

        try:
            return await patiently(ask, self._policy, self._publish, parts[number].label)
        except NotFoundError as error:
            raise NotFoundError(
                f"part {number + 1} of {len(parts)} of the model is missing at its source: {error}"
            ) from error

    async def _keep(self, heads: dict[str, Remote]) -> set[str]:
        """The parts that an interrupted pull completed and whose digest, as the server gives it, is right."""
        staging = self._left.parts
        complete = set()
        for name in await in_thread(staging.prepare, heads):
            sha256 = heads[name].sha256
            if sha256 and (await digests_of(staging.files / name))[1] == sha256:
                complete.add(name)
            else:
                await in_thread((staging.files / name).unlink)
        return complete

    async def _fetch_part(self, part: HttpSource, head: Remote) -> None:
        partial = self._left.parts.arriving(part.file_name)
        fetch = await self._fetch_into(partial, part, head.total)
        found = partial.hexdigest()
        if fetch.sha256 and found != fetch.sha256:
            await in_thread(partial.discard)
            raise mismatch(f"{part.label}: the file", found, fetch.sha256, "What arrived was deleted; pull again")
        await in_thread(self._left.parts.arrived, partial, part.file_name)
        self._progress.file_done(partial.size)

    async def _planned(self, paths: Sequence[Path]) -> Joined:
        try:
            return await in_thread(join, paths)
        except GgufError as error:
            await in_thread(self._left.discard)
            raise PullError(f"{self._plan.source.label}: the parts do not make a model: {error}.") from error

    async def _join(self, joined: Joined, paths: Sequence[Path], *, consume: bool = False) -> None:
        partial = self._left.file
        self._publish(Status(f"joining {len(paths)} parts, {byte_size(joined.size)}"))
        self._progress.begin(0, joined.size)
        async with partial.opened():
            await in_thread(partial.restart)
            await in_thread(partial.write, joined.head)
            for path, gap, start in zip(paths, joined.gaps, joined.starts, strict=True):
                await in_thread(partial.write, bytes(gap))
                async with opened(path) as file:
                    await in_thread(file.seek, start)
                    await self._append(file, joined.size)
                if consume:
                    await in_thread(path.unlink)
            await in_thread(partial.sync)
        self._progress.file_done(partial.size)
        if partial.size != joined.size:
            raise self._changed()

    async def _finish(self, validator: str) -> Success:
        partial = self._left.file
        return await self._install(partial.path, partial.size, partial.hexdigest(), validator)


def _version(paths: Sequence[Path]) -> str:
    return fingerprint({path.name: path.stat() for path in paths})
