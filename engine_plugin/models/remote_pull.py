"""Pulls of a file from a server, of a GGUF model in parts, which are joined to one file, and from a hub."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from engine_plugin.download.disk import check_room
from engine_plugin.download.events import StepStarted
from engine_plugin.download.fetch import Fetch
from engine_plugin.download.remote import http_client, open_url, patiently
from engine_plugin.download.source import HttpSource
from engine_plugin.errors import NotFoundError, PullError
from engine_plugin.models.gguf import GgufError, join
from engine_plugin.models.hubs import RemoteFile, RepositorySource, checked_files
from engine_plugin.models.layout import fingerprint
from engine_plugin.models.pull import CopyPull, Pull
from engine_plugin.models.request import PartsSource
from engine_plugin.system.files import in_thread, opened
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import httpx

    from engine_plugin.download.events import Success
    from engine_plugin.download.remote import Remote
    from engine_plugin.models.gguf import Joined
    from engine_plugin.models.request import PullPlan

__all__ = ["pull_for"]


class FilePull(Pull):
    """A pull of a model that is one file on a server."""

    source: HttpSource

    async def _pull(self) -> Success:
        partial, wanted, insecure = self.left.file, self.plan.sha256, self.plan.insecure
        fetch = Fetch(self.source, partial, self.progress, self.policy, insecure, wanted, present=self._is_present)
        await fetch.run()
        if fetch.skipped:
            return await self._already()
        self.publish(StepStarted("verifying sha256"))
        digest = partial.hexdigest()
        success = await self._install(partial.path, partial.size, digest, fetch.validator, fetch.sha256)
        await in_thread(partial.forget)
        return success

    def _is_present(self, remote: Remote) -> bool:
        if self.plan.sha256 or self.present is None:
            return False
        if remote.sha256:
            return self._is_digest(remote.sha256)
        return self.present.size == remote.total and self._is_from_here(remote.validator)


class PartsPull(Pull):
    """A pull of a GGUF model that is in parts, on a server or on this machine."""

    source: PartsSource

    async def _pull(self) -> Success:
        remote = [part for part in self.source.parts if isinstance(part, HttpSource)]
        local = [part.path for part in self.source.parts if not isinstance(part, HttpSource)]
        await in_thread(self.left.file.discard)
        try:
            return await (self._fetch_all(remote) if remote else self._copy_all(local))
        finally:
            await in_thread(self.left.file.discard)  # the installed file has left it

    async def _copy_all(self, paths: Sequence[Path]) -> Success:
        before = await in_thread(_version, paths)
        if self._is_from_here(before):
            return await self._already()
        joined = await self._planned(paths)
        await in_thread(check_room, self.index.partials, joined.size)
        await self._join(joined, paths)
        if await in_thread(_version, paths) != before:
            raise self._changed(self.source.label)
        return await self._installed(before)

    async def _fetch_all(self, parts: Sequence[HttpSource]) -> Success:
        client = await in_thread(http_client, self.policy, insecure=self.plan.insecure)
        async with client:
            heads = [await self._head(client, parts, number) for number in range(len(parts))]
        known = [head.sha256 or head.validator for head in heads]
        validator = " ".join(known) if all(known) else ""
        if self._is_from_here(validator):
            return await self._already()
        files = [RemoteFile(part.file_name, head.total, head.sha256) for part, head in zip(parts, heads, strict=True)]
        complete = await self._keep(files)
        # A part is deleted when it has been joined, so that the disk never holds more than one of them twice.
        sizes = {file.path: file.size for file in files}
        kept = sum(sizes[name] for name in complete)
        await self._expect(kept, sum(sizes.values()), spare=max(sizes.values()))
        for part, file in zip(parts, files, strict=True):
            if file.path not in complete:
                await self._fetch_listed(part, file, "server")
        paths = [self.left.files / file.path for file in files]
        await self._join(await self._planned(paths), paths, consume=True)
        return await self._installed(validator)

    async def _head(self, client: httpx.AsyncClient, parts: Sequence[HttpSource], number: int) -> Remote:
        """What the server says of a part, before any of them is fetched."""

        async def ask() -> Remote:
            async with open_url(client, parts[number], {}, insecure=self.plan.insecure) as answer:
                answer.check_status()
                return answer.remote()

        try:
            return await patiently(ask, self.policy, self.publish, parts[number].label)
        except NotFoundError as error:
            raise NotFoundError(
                f"part {number + 1} of {len(parts)} of the model is missing at its source: {error}"
            ) from error

    async def _planned(self, paths: Sequence[Path]) -> Joined:
        try:
            return await in_thread(join, paths)
        except GgufError as error:
            await in_thread(self.left.discard)
            raise PullError(f"{self.source.label}: the parts do not make a model: {error}.") from error

    async def _join(self, joined: Joined, paths: Sequence[Path], *, consume: bool = False) -> None:
        partial = self.left.file
        self.publish(StepStarted(f"joining {len(paths)} parts, {byte_size(joined.size)}"))
        self.progress.begin(0, joined.size)
        async with partial.opened():
            await in_thread(partial.write, joined.head)
            for path, gap, start in zip(paths, joined.gaps, joined.starts, strict=True):
                await in_thread(partial.write, bytes(gap))
                async with opened(path) as file:
                    await in_thread(file.seek, start)
                    await self._append(partial, file, joined.size)
                if consume:
                    await in_thread(path.unlink)
            await in_thread(partial.sync)
        self.progress.file_done(partial.size)
        if partial.size != joined.size:
            raise self._changed(self.source.label)

    async def _installed(self, validator: str) -> Success:
        partial = self.left.file
        return await self._install(partial.path, partial.size, partial.hexdigest(), validator)


def _version(paths: Sequence[Path]) -> str:
    return fingerprint({path.name: path.stat() for path in paths})


class RepositoryPull(Pull):
    """A pull of a model that is a folder, from a repository on a hub."""

    source: RepositorySource

    async def _pull(self) -> Success:
        source, hub = self.source, self.hubs[self.source.hub]
        self.publish(StepStarted(f"asking {hub.title} for {source.repository}"))
        listing = await hub.listing(source, self.publish, insecure=self.plan.insecure)
        if self._is_from_here(listing.commit):
            return await self._already()
        by_path = {file.path: file for file in listing.files}
        files = checked_files([by_path[path] for path in self._chosen(list(by_path))], source.label)
        here = await in_thread(self.left.prepare, [file.path for file in files])
        for file in files:
            if file.has_digest and file.path not in here:
                await in_thread(self._adopt, file)
        digests = await self._keep(files, by_size=True)
        total = sum(file.size for file in files)
        await self._expect(sum(by_path[path].size for path in digests), total)
        for file in files:
            if file.path in digests:
                continue
            if file.size:
                place = hub.file_source(source, listing.commit, file.path)
                digests[file.path] = await self._fetch_listed(place, file, "hub")
            else:
                partial = self.left.arriving(file.path)
                async with partial.opened():
                    await in_thread(partial.restart)
                digests[file.path] = await self._accept(partial, file, "hub")
        return await self._finish(digests, total, listing.commit)

    def _adopt(self, file: RemoteFile) -> None:
        """Link or copy a file from the present model that may be the listed one."""
        present = self.index.path(self.plan.name) / file.path
        if not present.is_file() or present.stat().st_size != file.size:
            return
        staged = self.left.place(file.path)
        try:
            os.link(present, staged)
        except OSError:
            shutil.copyfile(present, staged)
            staged.chmod(0o600)


def pull_for(plan: PullPlan) -> type[Pull]:
    """The kind of pull that a plan needs."""
    kinds: dict[type, type[Pull]] = {
        HttpSource: FilePull,
        PartsSource: PartsPull,
        RepositorySource: RepositoryPull,
    }
    return kinds.get(type(plan.source), CopyPull)
