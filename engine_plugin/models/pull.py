"""A pull from its plan to a model in its place: fetch or copy, verify, inspect, install."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

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
from engine_plugin.files import BLOCK, in_thread, opened, private_folder
from engine_plugin.models.names import other_case
from engine_plugin.models.records import Record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from io import FileIO
    from pathlib import Path

    from engine_plugin.download.events import PullEvent
    from engine_plugin.download.remote import FetchPolicy, Remote
    from engine_plugin.models.info import Inspection
    from engine_plugin.models.request import LocalSource, PullPlan
    from engine_plugin.models.shelf import Shelf

__all__ = ["Pull"]


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A whole file in the partial: the digest it must have ("" unknown) and what tells its version."""

    sha256: str
    validator: str


class Pull:
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
        self._partial = Partial(shelf.partials, plan.name)
        self._present: Record | None = None

    async def run(self) -> Success:
        """Pull. Raises PullError, ModelNotFoundError, AuthError or InvalidRequestError; what arrived is kept where
        that is sound."""
        plan = self._plan
        self._publish(Status(f"resolving {plan.name}"))
        try:
            await in_thread(private_folder, self._shelf.partials)
            async with self._partial.locked(
                lambda: self._publish(Status(f"waiting for another process that pulls {plan.name}"))
            ):
                await self._refuse_other_case()
                return await self._run()
        except OSError as error:
            told = disk_error(error, self._shelf.root, self._partial.size, self._partial.state.total)
            raise PullError(f"{told} Deleting the model removes it.") from error
        except PullError:
            raise
        except DownloadError as error:
            raise PullError(str(error)) from error
        except AuthError as error:
            raise AuthError(
                f"{error} Give username and password (for Hugging Face: any username and an access token), and "
                "accept the licence there."
            ) from error
        except NotFoundError as error:
            raise ModelNotFoundError(str(error)) from error

    async def _refuse_other_case(self) -> None:
        name = self._plan.name
        other = other_case(name, [*await in_thread(self._shelf.names), *self._reserved])
        if other:
            raise InvalidRequestError(
                f"model: {name!r} differs only by case from {other!r}, which is present; "
                "use that name or another one."
            )

    async def _run(self) -> Success:
        plan, partial = self._plan, self._partial
        self._present = await self._shelf.get(plan.name)
        if self._present is not None and self._present.digest == f"sha256:{plan.sha256}":
            await in_thread(partial.discard)
            return await self._already(self._present)
        if not isinstance(plan.source, HttpSource):
            await in_thread(partial.discard)  # a copy is quick: it always begins anew
        try:
            async with partial.opened():
                arrived = await self._arrive()
                if isinstance(arrived, _Arrived):
                    await in_thread(partial.sync)
        finally:
            if not partial.size:
                await in_thread(partial.discard)
        if isinstance(arrived, _Arrived):
            return await self._install(arrived)
        await in_thread(partial.discard)
        return await self._already(arrived)

    async def _arrive(self) -> _Arrived | Record:
        """Fill the partial; or the present model's record when this very file is here already."""
        if not isinstance(self._plan.source, HttpSource):
            return await self._copy(self._plan.source)
        fetch = Fetch(
            self._plan.source,
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

    def _is_present(self, remote: Remote) -> bool:
        if self._plan.sha256:
            return False
        if remote.sha256:
            return self._present is not None and self._present.digest == f"sha256:{remote.sha256}"
        return self._same_version(remote.validator, remote.total)

    def _same_version(self, validator: str, size: int) -> bool:
        present = self._present
        return (
            present is not None
            and bool(validator)
            and (present.source, present.validator, present.size) == (self._plan.source.label, validator, size)
        )

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

    async def _already(self, record: Record) -> Success:
        record = await self._shelf.set_kind(record, self._plan.kind)
        return Success(record.name, record.size, record.digest)

    async def _install(self, arrived: _Arrived) -> Success:
        plan, partial = self._plan, self._partial
        if not partial.size:
            raise PullError(f"{plan.source.label}: the file is empty.")
        self._publish(Status("verifying sha256"))
        digest = partial.hexdigest()
        if arrived.sha256 and digest != arrived.sha256:
            await in_thread(partial.discard)
            raise PullError(
                f"{plan.source.label}: the file has sha256:{digest}, expected is sha256:{arrived.sha256}. "
                "What arrived was deleted; pull again, and correct the digest or the source if it stays so."
            )
        self._publish(Status("inspecting the model"))
        try:
            found = await self._inspect(partial.path)
        except (InvalidRequestError, PullError) as error:
            await in_thread(partial.discard)
            raise PullError(f"{plan.source.label}: this is no model that can be used: {error}") from error
        record = await self._shelf.put(
            partial.path,
            Record(
                name=plan.name,
                kind=plan.kind or found.kind,
                size=partial.size,
                mtime_ns=0,
                digest=f"sha256:{digest}",
                source=plan.source.label,
                validator=arrived.validator,
                pulled_at=datetime.now(UTC).isoformat(),
                kind_given=bool(plan.kind),
                details=found.details,
            ),
        )
        await in_thread(partial.forget)
        return Success(record.name, record.size, record.digest)
