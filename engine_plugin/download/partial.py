"""An incomplete file: its bytes, its running digest, and what a later attempt needs to resume it.

`.partial/<name>.part` holds the bytes, `.partial/<name>.json` their source and version, `.partial/<name>.lock` keeps
two processes from writing them at once. All survive a restart of the plugin.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from engine_plugin.system.files import hash_rest, in_thread, private_folder, read_json, take_lock, write_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from io import FileIO
    from pathlib import Path

__all__ = ["Partial", "PartialState", "is_header_value"]


def is_header_value(text: str) -> bool:
    """Whether a text can be sent as the value of a header. Servers may send validators that cannot."""
    return text.isascii() and text.isprintable()


@dataclass(frozen=True, slots=True)
class PartialState:
    """The source and version of the bytes of a partial, with which the rest of the same file can be requested."""

    source: str = ""
    etag: str = ""
    last_modified: str = ""
    total: int = 0
    sha256: str = ""

    @property
    def validator(self) -> str:
        """The ETag or Last-Modified, which identifies the version of the file, or ""."""
        return self.etag or self.last_modified

    @classmethod
    def from_json(cls, value: dict[str, Any] | None) -> PartialState:
        """Read the saved state. For anything else the state is empty and fits no source."""
        try:
            state = cls(**(value or {}))
        except TypeError:
            return cls()
        texts = (state.source, state.etag, state.last_modified, state.sha256)
        if not all(isinstance(text, str) for text in texts) or not isinstance(state.total, int):
            return cls()
        return state if is_header_value(state.etag) and is_header_value(state.last_modified) else cls()


class Partial:
    """One partial file. Its methods that are not async block: call them in a thread."""

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
        """Lock the partial against other processes; `waiting` is called once if another one holds the lock."""
        with await take_lock(self.folder / f"{self._name}.lock", waiting):
            yield

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Open the file and its state, and close them on leaving. Call `resume` or `restart` next. Raises OSError."""
        try:
            await in_thread(self._open)
            yield
        finally:
            await in_thread(self.close)

    def write(self, data: bytes | bytearray) -> None:
        """Append. `size` and digest stay right when it raises OSError, such as for a full disk."""
        file = self._opened()
        view = memoryview(data)
        while view:
            written = file.write(view)
            self._digest.update(view[:written])
            self.size += written
            view = view[written:]

    def restart(self) -> None:
        """Delete the bytes and the state, to begin anew."""
        file = self._opened()
        file.seek(0)
        file.truncate()
        self.size = 0
        self._digest = hashlib.sha256()
        self.save_state(PartialState())

    def save_state(self, state: PartialState) -> None:
        """Write the source and version of the bytes."""
        self.state = state
        write_json(self._state_path, asdict(state), self.folder)

    def hexdigest(self) -> str:
        """SHA-256 of the bytes so far, 64 hex digits."""
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Flush the bytes to the disk (fsync)."""
        os.fsync(self._opened().fileno())

    def close(self) -> None:
        """Close the file; the bytes stay. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def forget(self) -> None:
        """Delete the state, once the file has been moved to its place."""
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
        """Keep the bytes of an earlier attempt, and read them for the running digest."""
        file = self._opened()
        self.size = os.fstat(
            file.fileno()
        ).st_size  # known at once, because an empty partial is deleted after a cancel
        self.size = await hash_rest(file, self._digest)
