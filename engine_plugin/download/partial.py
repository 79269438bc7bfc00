"""A file that is still arriving: its bytes, its running digest, and what is needed to go on later.

`.partial/<name>.part` holds the bytes, `.partial/<name>.json` says whose they are, `.partial/<name>.lock` keeps
two processes from writing them at once. All survive a restart of the plugin.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from engine_plugin.system.files import BLOCK, in_thread, private_folder, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from io import FileIO
    from pathlib import Path

__all__ = ["Partial", "PartialState", "is_header_value"]

_LOCK_POLL = 0.25
"""Seconds between two looks at a lock that another process holds."""


def is_header_value(text: str) -> bool:
    """Whether a validator can be sent back as it came; a server may have sent anything."""
    return text.isascii() and text.isprintable()


@dataclass(frozen=True, slots=True)
class PartialState:
    """Whose bytes a partial holds: enough to ask a server for the rest of the very same file."""

    source: str = ""
    etag: str = ""
    last_modified: str = ""
    total: int = 0
    sha256: str = ""

    @classmethod
    def from_json(cls, value: dict[str, Any] | None) -> PartialState:
        """The state that was saved; an empty one, which fits no source, for anything else."""
        try:
            state = cls(**(value or {}))
        except TypeError:
            return cls()
        texts = (state.source, state.etag, state.last_modified, state.sha256)
        if not all(isinstance(text, str) for text in texts) or not isinstance(state.total, int):
            return cls()
        return state if is_header_value(state.etag) and is_header_value(state.last_modified) else cls()


class Partial:
    """One partial file. Those of its methods that are not async block: call them in a thread."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.path = folder / f"{name}.part"
        self.state = PartialState()
        self.size = 0
        self._name = name
        self._state_path = folder / f"{name}.json"
        self._file: FileIO | None = None
        self._digest = hashlib.sha256()

    @asynccontextmanager
    async def locked(self, waiting: Callable[[], None]) -> AsyncIterator[None]:
        """Hold the partial against other processes; `waiting` is called once if another one holds it now."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / f"{self._name}.lock", mode=0o600, thread_local=False)
        told = False
        while True:
            try:
                lock.acquire(blocking=False)
                break
            except Timeout:
                if not told:
                    told = True
                    waiting()
                await asyncio.sleep(_LOCK_POLL)
        try:
            yield
        finally:
            lock.release()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Open the file and its state, and close it in the end; `resume` or `restart` comes next. Raises OSError."""
        try:
            await in_thread(self._open)
            yield
        finally:
            await in_thread(self.close)

    def leftovers(self) -> bool:
        """Whether an unfinished pull left bytes here."""
        return self.path.exists()

    def write(self, data: bytes) -> None:
        """Append. After an OSError (a full disk) the file ends where it ended before, as far as is known."""
        file = self._opened()
        view = memoryview(data)
        while view:
            written = file.write(view)
            self._digest.update(view[:written])
            self.size += written
            view = view[written:]

    def restart(self) -> None:
        """Throw the bytes away: they are not those of the file that is asked for now."""
        file = self._opened()
        file.seek(0)
        file.truncate()
        self.size = 0
        self._digest = hashlib.sha256()
        self.save_state(PartialState())

    def save_state(self, state: PartialState) -> None:
        """Remember whose bytes these are, across processes."""
        self.state = state
        write_json(self._state_path, asdict(state), self.folder)

    def hexdigest(self) -> str:
        """SHA-256 of the bytes that are here, 64 hex digits."""
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Have the bytes on the disk itself."""
        os.fsync(self._opened().fileno())

    def close(self) -> None:
        """Close the file; the bytes stay. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def forget(self) -> None:
        """Delete what is left of the state once the file is in its place."""
        self._state_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Close and delete bytes and state."""
        self.close()
        self.path.unlink(missing_ok=True)
        self.forget()

    def _opened(self) -> FileIO:
        if self._file is None:
            raise ValueError("the partial is not open")
        return self._file

    def _open(self) -> None:
        private_folder(self.folder)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self.state = PartialState.from_json(read_json(self._state_path))

    async def resume(self) -> None:
        """Take over the bytes that an earlier attempt left: read them for the running digest."""
        while await in_thread(self._hash_block):
            pass

    def _hash_block(self) -> int:
        block = self._opened().read(BLOCK)
        self._digest.update(block)
        self.size += len(block)
        return len(block)
