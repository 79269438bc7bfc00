"""A pull of a GGUF model that its source has in parts: all of them are fetched and joined to one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.download.disk import check_room
from engine_plugin.download.events import Status
from engine_plugin.download.fetch import Fetch, ProgressReport
from engine_plugin.download.partial import Partial
from engine_plugin.download.remote import http_client, open_url
from engine_plugin.download.sizes import byte_size
from engine_plugin.download.source import HttpSource
from engine_plugin.errors import NotFoundError, PullError
from engine_plugin.models.folderpull import WholeProgress
from engine_plugin.models.gguf import GgufError, join
from engine_plugin.models.pull import Pull
from engine_plugin.models.repository import patiently
from engine_plugin.models.request import PartsSource
from engine_plugin.models.staging import Staging, digests_of
from engine_plugin.models.tree import fingerprint
from engine_plugin.system.files import BLOCK, in_thread, opened

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    import httpx

    from engine_plugin.download.events import PullEvent, Success
    from engine_plugin.download.remote import FetchPolicy, Remote
    from engine_plugin.models.gguf import Joined
    from engine_plugin.models.index import Shelf
    from engine_plugin.models.info import Inspection
    from engine_plugin.models.pull import Leftovers
    from engine_plugin.models.request import PullPlan

__all__ = ["PartsLeftovers", "PartsPull"]


class PartsLeftovers:
    """What unfinished pulls of a file's name left: the file on its way, and parts of it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.joined = Partial(folder, name)
        self.staging = Staging(folder, name)

    @property
    def size(self) -> int:
        """Bytes that are here, as far as this process knows."""
        return self.joined.size or self.staging.size

    def locked(self, waiting: Callable[[], None]) -> AbstractAsyncContextManager[None]:
        """Hold them against other processes; `waiting` is called once if another one holds them now."""
        return self.joined.locked(waiting)

    def leftovers(self) -> bool:
        """Whether anything is left here."""
        return self.joined.leftovers() or self.staging.leftovers()

    def discard(self) -> None:
        """Delete all of it."""
        self.joined.discard()
        self.staging.discard()


class PartsPull(Pull):
    """A pull of a model in parts."""

    def __init__(
        self,
        plan: PullPlan,
        shelf: Shelf,
        inspect: Callable[[Path], Awaitable[Inspection]],
        policy: FetchPolicy,
        publish: Callable[[PullEvent], None],
        reserved: Sequence[str] = (),
    ) -> None:
        super().__init__(plan, shelf, inspect, policy, publish, reserved)
        self._here = PartsLeftovers(shelf.partials, plan.name)
        self._bytes = 0

    @property
    def _left(self) -> Leftovers:
        return self._here

    @property
    def _total(self) -> int:
        return self._bytes

    async def _pull(self) -> Success:
        if not isinstance(self._plan.source, PartsSource):
            raise TypeError(f"{self._plan.source.label} is not in parts")
        remote = [part for part in self._plan.source.parts if isinstance(part, HttpSource)]
        local = [part.path for part in self._plan.source.parts if not isinstance(part, HttpSource)]
        await in_thread(self._here.joined.discard)
        try:
            return await (self._fetch(remote) if remote else self._copy(local))
        finally:
            await in_thread(self._here.joined.discard)  # what was installed is not there any more
            await in_thread(self._here.staging.sweep)

    async def _copy(self, paths: Sequence[Path]) -> Success:
        before = await in_thread(lambda: fingerprint({path.name: path.stat() for path in paths}))
        if self._present is not None and self._is_from_here(before):
            return await self._already(self._present)
        joined = await self._planned(paths)
        await in_thread(check_room, self._shelf.partials, joined.size)
        await self._join(joined, paths)
        if await in_thread(lambda: fingerprint({path.name: path.stat() for path in paths})) != before:
            raise PullError(
                f"{self._plan.source.label}: it changed while it was copied; pull again when it is complete."
            )
        return await self._finish(before)

    async def _fetch(self, parts: Sequence[HttpSource]) -> Success:
        client = await in_thread(http_client, self._policy, insecure=self._plan.insecure)
        async with client:
            heads = [await self._head(client, parts, number) for number in range(len(parts))]
        known = [head.sha256 or head.validator for head in heads]
        validator = " ".join(known) if all(known) else ""
        if self._present is not None and self._is_from_here(validator):
            await in_thread(self._here.discard)
            return await self._already(self._present)
        names = [part.file_name for part in parts]
        whole = await self._keep(dict(zip(names, heads, strict=True)))
        staging, sizes = self._here.staging, [head.total for head in heads]
        self._bytes = sum(sizes)
        kept = sum(head.total for name, head in zip(names, heads, strict=True) if name in whole)
        here = await in_thread(staging.here)
        # A part is deleted when it has been joined, so that one of them is there twice at most.
        await in_thread(check_room, self._shelf.partials, max(self._bytes + max(sizes) - kept - here, 0))
        total = WholeProgress(self._publish, kept, self._bytes, staging)
        for part, head in zip(parts, heads, strict=True):
            if part.file_name not in whole:
                total.add(await self._fetch_part(part, head, total))
        paths = [staging.files / name for name in names]
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
        """The parts that an earlier pull left whole; only those are believed of which the server tells the digest."""
        staging = self._here.staging
        whole = set()
        for name in await in_thread(staging.prepare, heads):
            sha256 = heads[name].sha256
            if sha256 and (await digests_of(staging.files / name))[1] == sha256:
                whole.add(name)
            else:
                await in_thread((staging.files / name).unlink)
        return whole

    async def _fetch_part(self, part: HttpSource, head: Remote, total: WholeProgress) -> int:
        partial = self._here.staging.arriving(part.file_name)
        async with partial.opened():
            fetch = Fetch(
                part, partial, total.publish, size=head.total, insecure=self._plan.insecure, policy=self._policy
            )
            await fetch.run()
            await in_thread(partial.sync)
        found = partial.hexdigest()
        if fetch.sha256 and found != fetch.sha256:
            await in_thread(partial.discard)
            raise catalogue.CHECKSUM_MISMATCH.error_as(
                PullError,
                place=f"{part.label}: the file",
                found=f"sha256:{found}",
                wanted=f"sha256:{fetch.sha256}",
                fix="What arrived was deleted; pull again",
            )
        await in_thread(self._here.staging.arrived, partial, part.file_name)
        return partial.size

    async def _planned(self, paths: Sequence[Path]) -> Joined:
        try:
            return await in_thread(join, paths)
        except GgufError as error:
            await in_thread(self._here.discard)
            raise PullError(f"{self._plan.source.label}: the parts do not make a model: {error}.") from error

    async def _join(self, joined: Joined, paths: Sequence[Path], *, consume: bool = False) -> None:
        partial = self._here.joined
        self._publish(Status(f"joining {len(paths)} parts, {byte_size(joined.size)}"))
        progress = ProgressReport(self._publish)
        async with partial.opened():
            await in_thread(partial.restart)
            await in_thread(partial.write, joined.head)
            for path, gap, start in zip(paths, joined.gaps, joined.starts, strict=True):
                await in_thread(partial.write, bytes(gap))
                async with opened(path) as file:
                    await in_thread(file.seek, start)
                    while block := await in_thread(file.read, BLOCK):
                        await in_thread(partial.write, block)
                        progress.at(partial.size, joined.size)
                if consume:
                    await in_thread(path.unlink)
            await in_thread(partial.sync)
        progress.last(partial.size, joined.size)
        if partial.size != joined.size:
            raise PullError(f"{self._plan.source.label}: it changed while it was joined; pull again.")

    async def _finish(self, validator: str) -> Success:
        partial = self._here.joined
        return await self._install(partial.path, partial.size, partial.hexdigest(), validator)
