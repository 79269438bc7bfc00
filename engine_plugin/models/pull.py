"""A pull from its plan to a model in its place: fetch or copy, verify, inspect, install."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from engine_plugin import catalogue
from engine_plugin.download.disk import check_room, disk_error
from engine_plugin.download.events import Status, Success
from engine_plugin.download.fetch import Fetch, ProgressReport
from engine_plugin.download.partial import Partial
from engine_plugin.download.source import HttpSource
from engine_plugin.errors import (
    AuthError,
    DownloadError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    PullError,
)
from engine_plugin.models.layout import Extent
from engine_plugin.models.records import Record
from engine_plugin.models.request import LocalSource, StoredSource
from engine_plugin.system.files import BLOCK, in_thread, opened, private_folder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from io import FileIO
    from pathlib import Path

    from engine_plugin.download.events import PullEvent
    from engine_plugin.download.remote import FetchPolicy, Remote
    from engine_plugin.models.index import Shelf
    from engine_plugin.models.info import Inspection
    from engine_plugin.models.request import PullPlan

__all__ = ["FilePull", "Leftovers", "Pull"]


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A whole file in the partial: the digest it must have ("" unknown) and what tells its version."""

    sha256: str
    validator: str


class Leftovers(Protocol):
    """What an unfinished pull left, held against other processes. `discard` blocks."""

    @property
    def size(self) -> int:
        """Bytes that are here, as far as this process knows."""

    def locked(self, waiting: Callable[[], None]) -> AbstractAsyncContextManager[None]:
        """Hold it; `waiting` is called once if another process holds it now."""

    def leftovers(self) -> bool:
        """Whether anything is left here."""

    def discard(self) -> None:
        """Delete it."""


class Pull(ABC):
    """One pull onto a shelf. `run` is called once; another process's pull of the same name is waited for."""

    def __init__(
        self,
        plan: PullPlan,
        shelf: Shelf,
        inspect: Callable[[Path], Awaitable[Inspection]],
        policy: FetchPolicy,
        publish: Callable[[PullEvent], None],
        reserved: Sequence[str] = (),
    ) -> None:
        """`reserved` are names beyond the shelf's (samples) from which the model's must not differ by case only."""
        self._plan = plan
        self._shelf = shelf
        self._inspect = inspect
        self._policy = policy
        self._publish = publish
        self._reserved = reserved
        self._present: Record | None = None

    @property
    @abstractmethod
    def _left(self) -> Leftovers:
        """What an unfinished pull of this model left, and this one fills."""

    @abstractmethod
    async def _pull(self) -> Success:
        """Pull, while nobody else does."""

    @property
    def _total(self) -> int:
        """Bytes that the model has, 0 while unknown."""
        return 0

    async def run(self) -> Success:
        """Pull. Raises PullError, ModelNotFoundError, AuthError or InvalidRequestError; what arrived is kept where
        that is sound."""
        plan = self._plan
        self._publish(Status(f"resolving {plan.name}"))
        try:
            await in_thread(private_folder, self._shelf.partials)
            async with self._left.locked(
                lambda: self._publish(Status(f"waiting for another process that pulls {plan.name}"))
            ):
                await self._refuse_clash()
                self._present = await self._shelf.get(plan.name)
                return await self._pull()
        except OSError as error:
            told = disk_error(error, self._shelf.root, self._left.size, self._total)
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
        names = [*await in_thread(self._shelf.names), *self._reserved]
        clash = self._shelf.layout.clash(self._plan.name, names)
        if clash:
            raise InvalidRequestError.at("model", f"{clash}")

    async def _already(self, record: Record) -> Success:
        record = await self._shelf.set_kind(record, self._plan.kind)
        return Success(record.name, record.size, record.digest)

    def _is_from_here(self, validator: str) -> bool:
        """Whether the model that is present came from this very source, as `validator` tells it apart."""
        present = self._present
        return (
            present is not None
            and bool(validator)
            and (present.source, present.validator) == (self._plan.source.label, validator)
        )

    async def _install(self, part: Path, size: int, digest: str, validator: str) -> Success:
        """Inspect what is whole and verified, and put it into its place. `digest` is 64 hex digits."""
        plan, present = self._plan, self._present
        self._publish(Status("inspecting the model"))
        try:
            found = await self._inspect(part)
        except (InvalidRequestError, PullError) as error:
            await in_thread(self._left.discard)
            raise PullError(f"{plan.source.label}: this is no model that can be used: {error}") from error
        record = await self._shelf.put(
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
        """Put what shares its bytes with another model of the store into its place."""
        if extent is None or not source.record.describes(extent):
            await in_thread(self._left.discard)
            raise PullError(f"{source.label}: it changed while it was copied; try again when it is complete.")
        self._publish(Status(f"copying {source.label}"))
        old = source.record
        kind = self._plan.kind or old.kind
        record = await self._shelf.put(
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


class FilePull(Pull):
    """A pull of a model that is one file."""

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
        self._partial = Partial(shelf.partials, plan.name)

    @property
    def _left(self) -> Leftovers:
        return self._partial

    @property
    def _total(self) -> int:
        return self._partial.state.total

    async def _pull(self) -> Success:
        plan, partial = self._plan, self._partial
        if self._present is not None and self._present.digest == f"sha256:{plan.sha256}":
            await in_thread(partial.discard)
            return await self._already(self._present)
        if not isinstance(plan.source, HttpSource):
            await in_thread(partial.discard)  # a copy is quick: it always begins anew
        if isinstance(plan.source, StoredSource) and await in_thread(self._link, plan.source):
            return await self._share(plan.source, partial.path, Extent.of(partial.path.stat()))
        try:
            async with partial.opened():
                arrived = await self._arrive()
                if isinstance(arrived, _Arrived):
                    await in_thread(partial.sync)
        except BaseException:
            if not isinstance(plan.source, HttpSource):  # a copy does not go on from there
                await in_thread(partial.discard)
            raise
        finally:
            if not partial.size:
                await in_thread(partial.discard)
        if isinstance(arrived, _Arrived):
            return await self._verify(arrived)
        await in_thread(partial.discard)
        return await self._already(arrived)

    async def _arrive(self) -> _Arrived | Record:
        """Fill the partial; or the present model's record when this very file is here already."""
        source = self._plan.source
        if isinstance(source, LocalSource):
            return await self._copy(source)
        if not isinstance(source, HttpSource):
            raise TypeError(f"{source.label} is no source of a file")
        fetch = Fetch(
            source,
            self._partial,
            self._publish,
            sha256=self._plan.sha256,
            insecure=self._plan.insecure,
            policy=self._policy,
            present=self._is_present,
        )
        fetched = await fetch.run()
        if self._present is not None and not fetched:
            return self._present
        return _Arrived(fetch.sha256, fetch.validator)

    def _link(self, source: StoredSource) -> bool:
        """Have the model's file here without copying it; False where the file system cannot."""
        try:
            os.link(os.path.realpath(source.path), self._partial.path)
        except OSError:
            return False
        return True

    def _is_present(self, remote: Remote) -> bool:
        if self._plan.sha256:
            return False
        if remote.sha256:
            return self._present is not None and self._present.digest == f"sha256:{remote.sha256}"
        return self._same_version(remote.validator, remote.total)

    def _same_version(self, validator: str, size: int) -> bool:
        return self._is_from_here(validator) and self._present is not None and self._present.size == size

    async def _copy(self, source: LocalSource) -> _Arrived | Record:
        async with AsyncExitStack() as stack:
            try:
                file = await stack.enter_async_context(opened(source.path))
            except OSError as error:
                raise PullError(f"{source.label}: cannot be read ({error.strerror}).") from error
            return await self._copy_from(file, source)

    async def _copy_from(self, file: FileIO, source: LocalSource) -> _Arrived | Record:
        partial = self._partial
        stat = source.path.stat()
        validator = f"mtime {stat.st_mtime_ns}"
        target = self._shelf.path(self._plan.name)
        if self._present is not None and (
            target.samefile(source.path) or self._same_version(validator, stat.st_size)
        ):
            return self._present
        await in_thread(check_room, partial.folder, stat.st_size)
        self._publish(Status(f"copying {source.label}"))
        progress = ProgressReport(self._publish, self._plan.sha256)
        while block := await in_thread(file.read, BLOCK):
            await in_thread(partial.write, block)
            progress.at(partial.size, stat.st_size)
        progress.last(partial.size, stat.st_size)
        after = source.path.stat()
        if (after.st_mtime_ns, after.st_size) != (stat.st_mtime_ns, partial.size):
            raise PullError(f"{source.label}: it changed while it was copied; pull again when it is complete.")
        return _Arrived(self._plan.sha256, validator)

    async def _verify(self, arrived: _Arrived) -> Success:
        plan, partial = self._plan, self._partial
        if not partial.size:
            raise PullError(f"{plan.source.label}: the file is empty.")
        self._publish(Status("verifying sha256"))
        digest = partial.hexdigest()
        if arrived.sha256 and digest != arrived.sha256:
            await in_thread(partial.discard)
            raise catalogue.CHECKSUM_MISMATCH.error_as(
                PullError,
                place=f"{plan.source.label}: the file",
                found=f"sha256:{digest}",
                wanted=f"sha256:{arrived.sha256}",
                fix="What arrived was deleted; pull again, and correct the digest or the source if it stays so",
            )
        success = await self._install(partial.path, partial.size, digest, arrived.validator)
        await in_thread(partial.forget)
        return success
