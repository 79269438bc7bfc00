"""A download over HTTP into a partial file, which resumes where it stopped.

Each attempt asks for the rest of the same file (Range and If-Range). The server may answer with the rest, the whole
file, another version, or that nothing is left. The download fails after several attempts in a row without progress.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.download.disk import ROOM_EVERY, check_reserve, check_room, disk_error
from engine_plugin.download.events import ChunkProgress, StepStarted
from engine_plugin.download.partial import PartialState
from engine_plugin.download.remote import (
    DroppedError,
    FetchPolicy,
    UnreachableError,
    http_client,
    open_url,
    patiently,
)
from engine_plugin.errors import DownloadError
from engine_plugin.system.files import in_thread
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

    from engine_plugin.download.events import PullEvent
    from engine_plugin.download.partial import Partial
    from engine_plugin.download.remote import Answer, Remote
    from engine_plugin.download.source import HttpSource

__all__ = ["Fetch", "ProgressReport"]

_FLUSH_BYTES = 1024 * 1024
_FLUSH_S = 0.1
"""Received bytes are written in pieces of this size, or after this time, whichever comes first."""

_SMALL = 64 * 1024
"""Bytes of one of several files whose end needs no event."""


class ProgressReport:
    """Publishes how far a download or copy is as ChunkProgress, about ten times a second.

    After `begin` it covers several files; else one, whose digest (`sha256`, 64 hex digits or "") every event has.
    """

    def __init__(self, publish: Callable[[PullEvent], None], sha256: str = "", every_s: float = 0.1) -> None:
        self.publish = publish
        self.sha256 = sha256
        self.completed = 0
        self.total = 0
        self._before = 0
        self._whole = 0
        self._every_s = every_s
        self._next = 0.0

    def begin(self, completed: int, total: int) -> None:
        """From now on report several files of `total` bytes together, of which `completed` are here."""
        self._before, self._whole, self._next = completed, total, 0.0
        self.at(0, 0)

    def at(self, completed: int, total: int, *, last: bool = False) -> None:
        """So many bytes of the current file are here, of `total` (0: unknown).

        Called for each piece, and at the end as `last`, which is always published, except for a small one of several
        files.
        """
        self.completed, self.total = self._before + completed, self._whole or total
        now = time.monotonic()
        if now >= self._next or (last and (self.completed >= self._whole or total >= _SMALL)):
            self._next = now + self._every_s
            digest = f"sha256:{self.sha256}" if self.sha256 and not self._whole else ""
            self.publish(ChunkProgress(digest, self.completed, self.total))

    def file_done(self, size: int) -> None:
        """A file is complete, with so many bytes."""
        self._before += size
        if self._before >= self._whole:
            self.at(0, self._before, last=True)


@dataclass(eq=False)
class Fetch:
    """One download into one partial. `run` is called once."""

    source: HttpSource
    partial: Partial
    progress: ProgressReport
    policy: FetchPolicy
    insecure: bool = False
    wanted: str = ""
    """The SHA-256 that the file must have (64 hex digits), if known."""
    size: int = 0
    """The bytes that the file must have, if known."""
    limit: int = 0
    """The most bytes, 0 for any number."""
    present: Callable[[Remote], bool] = lambda _: False
    """Returns whether the file of an answer is already on this machine."""

    validator: str = field(default="", init=False)
    """The ETag or Last-Modified of the version that has arrived."""
    skipped: bool = field(default=False, init=False)
    """Whether `present` returned True, so that nothing was downloaded."""
    _named: str = field(default="", init=False)
    _answered: bool = field(default=False, init=False)
    _room_checked: int = field(default=0, init=False)

    @property
    def sha256(self) -> str:
        """The expected digest (64 hex digits): the caller's, else the server's, else ""."""
        return self.wanted or self._named

    async def run(self) -> None:
        """Download the whole file, and sync the partial; an empty one is deleted.

        Raises DownloadError, AuthError, NotFoundError, InvalidRequestError, OSError.
        """
        async with self.partial.opened():
            try:
                await self._fill()
                await in_thread(self.partial.sync)
            finally:
                if not self.partial.size:
                    await in_thread(self.partial.discard)

    async def _fill(self) -> None:
        await self._prepare()
        if self.partial.size and self.partial.size == self.partial.state.total and self._verified():
            self.validator = self.partial.state.validator
            return
        client = await in_thread(http_client, self.policy, insecure=self.insecure)  # reads root certificates
        async with client:
            publish, label = self.progress.publish, self.source.label
            await patiently(lambda: self._attempt(client), self.policy, publish, label, lambda: self.partial.size)

    def _verified(self) -> bool:
        return bool(self.sha256) and self.partial.hexdigest() == self.sha256

    async def _prepare(self) -> None:
        """Keep the bytes of an earlier download if they are of this source and their version can be checked."""
        state = self.partial.state
        same = state.source == self.source.label and (not self.wanted or state.sha256 in {"", self.wanted})
        if not same or not self._resumable(state):
            await in_thread(self.partial.restart)
            return
        self.progress.publish(StepStarted("checking the bytes of an earlier download"))
        await self.partial.resume()

    def _resumable(self, state: PartialState) -> bool:
        return bool(state.validator or self.wanted or state.sha256)

    def _headers(self) -> dict[str, str]:
        state = self.partial.state
        if not self.partial.size:
            return {}
        headers = {"Range": f"bytes={self.partial.size}-"}
        return {**headers, "If-Range": state.validator} if state.validator else headers

    async def _attempt(self, client: httpx.AsyncClient) -> None:
        if self.partial.size and not self._resumable(self.partial.state):
            await in_thread(self.partial.restart)
        try:
            async with open_url(client, self.source, self._headers(), insecure=self.insecure) as answer:
                self._answered = True
                answer.check_status()
                await self._receive(answer)
        except UnreachableError as error:
            if self._answered:
                raise DroppedError("the server is no longer reachable") from error
            raise

    async def _receive(self, answer: Answer) -> None:
        remote = answer.remote()
        self.skipped = self.present(remote)
        if self.skipped:
            return
        if answer.response.status_code == 416:
            await self._nothing_more(remote)
            return
        await self._place(answer, remote)
        total = self.partial.state.total or self.size
        await self._check_size(total)
        await in_thread(check_room, self.partial.folder, max(total - self.partial.size, 0))
        self.progress.publish(StepStarted(f"downloading {self.source.label}"))
        try:
            await self._store_body(answer, total)
        except (DownloadError, OSError) as error:
            if total:
                raise
            arrived = self.partial.size
            await in_thread(self.partial.restart)  # a file of unknown size may never fit
            if isinstance(error, OSError):
                raise disk_error(error, self.partial.folder, arrived, total) from error
            raise
        if total and self.partial.size < total:
            raise DroppedError(f"the server ended after {self.partial.size} of {total} bytes")

    async def _check_size(self, total: int) -> None:
        """Raise DownloadError unless the announced size is the expected one and within the limit."""
        if self.size and total != self.size:
            await in_thread(self.partial.restart)
            raise DownloadError(
                f"{self.source.label}: the file has {total} bytes, expected {self.size}. Correct the size or the URL."
            )
        if self.limit and total > self.limit:
            raise DownloadError(f"{self.source.label}: the file has {total} bytes; the limit is {self.limit}.")

    async def _nothing_more(self, remote: Remote) -> None:
        """Handle status 416: the bytes that have arrived are the whole file, or of another one."""
        partial = self.partial
        totals = {remote.total, partial.state.total} - {0}
        if totals == {partial.size}:
            self.validator = partial.state.validator
            self._named = partial.state.sha256
            return
        await in_thread(partial.restart)
        raise DroppedError("the file on the server is shorter than what has arrived; starting over")

    async def _place(self, answer: Answer, remote: Remote) -> None:
        """Prepare the partial for the body of an answer, and save the version that it will hold."""
        partial = self.partial
        if self.wanted and remote.linked_sha256 not in {"", self.wanted}:
            raise catalogue.CHECKSUM_MISMATCH.error(
                place=f"{self.source.label}: the server",
                found=f"sha256:{remote.linked_sha256}",
                wanted=f"sha256:{self.wanted}",
                fix="Correct the digest or the URL",
            )
        if answer.response.status_code == 206:
            await self._check_rest(answer, remote)
            known = partial.state
            self.progress.publish(StepStarted(f"resuming after {byte_size(partial.size)}"))
        else:
            known = PartialState()
            if partial.size:
                await in_thread(partial.restart)
                self.progress.publish(StepStarted("the server sends the whole file again; starting over"))
        self._named = remote.sha256 or known.sha256
        self.progress.sha256 = self.sha256
        state = PartialState(
            source=self.source.label,
            etag=remote.etag or known.etag,
            last_modified=remote.last_modified or known.last_modified,
            total=remote.total or known.total,
            sha256=self.sha256,
        )
        self.validator = state.validator
        if state != partial.state:
            await in_thread(partial.save_state, state)

    async def _check_rest(self, answer: Answer, remote: Remote) -> None:
        """Check that a 206 continues the file whose first bytes have arrived."""
        partial, state = self.partial, self.partial.state
        if not partial.size or remote.start != partial.size:
            raise DownloadError(f"{answer.place}: the server sent bytes from {remote.start}, not {partial.size}.")
        if remote.etag and state.etag and remote.etag != state.etag:
            await in_thread(partial.restart)
            raise DroppedError("the file changed on the server; starting over")
        if remote.total and state.total and remote.total != state.total:
            await in_thread(partial.restart)
            raise DownloadError(
                f"{answer.place}: the size of the file changed from {state.total} to {remote.total} bytes. "
                "What arrived was deleted; try again."
            )

    async def _store_body(self, answer: Answer, total: int) -> None:
        """Write the body in large pieces: a call of a thread for each chunk would take longer than the write."""
        waiting, written_at = bytearray(), 0.0
        try:
            async for chunk in answer.response.aiter_raw():
                here = self.partial.size + len(waiting) + len(chunk)
                if total and here > total:
                    raise DownloadError(
                        f"{answer.place}: the server sent more than the {total} bytes that it announced."
                    )
                if self.limit and here > self.limit:
                    raise DownloadError(f"{answer.place}: the server sent more than the limit of {self.limit} bytes.")
                waiting += chunk
                if len(waiting) >= _FLUSH_BYTES or time.monotonic() >= written_at + _FLUSH_S:
                    data, waiting = waiting, bytearray()
                    await in_thread(self._write, data, total)
                    written_at = time.monotonic()
                self.progress.at(here, total)
        finally:
            try:
                if waiting:
                    await in_thread(self.partial.write, waiting)
            finally:
                self.progress.at(self.partial.size, total, last=True)

    def _write(self, data: bytearray, total: int) -> None:
        """Append, and check the free space every ROOM_EVERY bytes. Blocks."""
        partial = self.partial
        partial.write(data)
        if partial.size >= self._room_checked + ROOM_EVERY:
            self._room_checked = partial.size
            if total:
                check_room(partial.folder, total - partial.size)
            else:
                check_reserve(partial.folder, partial.size)
