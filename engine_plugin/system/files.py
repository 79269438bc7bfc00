"""File work in threads, and files that are whole or absent."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import errno
import functools
import hashlib
import json
import math
import os
import re
import stat
import sys
import threading
import time
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar

from engine_plugin import jsontext
from engine_plugin.jsontext import JsonError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from io import FileIO

    from filelock import AcquireReturnProxy, FileLock

__all__ = [
    "BLOCK",
    "LARGEST_JSON",
    "LFS_POINTER",
    "hash_rest",
    "in_thread",
    "load_json",
    "make_private",
    "opened",
    "private_data_dir",
    "private_folder",
    "read_json",
    "sha256_of",
    "sync_folder",
    "sync_tree",
    "take_lock",
    "write_json",
    "write_whole",
]

BLOCK = 8 * 1024 * 1024
"""Bytes that one call in a thread reads, hashes or copies: some milliseconds of work."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The first bytes of a Git LFS pointer, which stands for a large file in a clone without Git LFS."""

_IN_A_DATA_DIR = re.compile(
    r"cache|home|logs|models|output|run|served|software|references\.json|default-models-[\w-]+\.(json|lock)"
)

LARGEST_JSON = 16 * 1024 * 1024
"""The most bytes of a JSON text from a file or a hub."""

_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Flags to open a file for reading; opening a FIFO does not block."""

_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)

_LOCK_PAUSE = 0.1
"""Seconds between two attempts to take a lock that another process holds."""

_SYNCING = 8
"""Threads of `sync_tree`."""

_NOT_SYNCED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EACCES})
"""The errors of a system that cannot sync folders, or not this one."""

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread. It has ended when this returns or raises, also when the caller is cancelled.

    A thread cannot be cancelled, so a file that it uses must not be closed or renamed before it has ended. If the
    system refuses another thread (a full pids cgroup, `ulimit -v`), the work runs here, so that a stop can go on.
    """
    once = _Once(functools.partial(contextvars.copy_context().run, functools.partial(work, *args, **kwargs)))
    try:
        task = asyncio.get_running_loop().run_in_executor(None, once)
    except RuntimeError:
        return once()
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                continue
        if not task.cancelled():
            task.exception()  # retrieved, but the caller gets the cancellation
        raise


class _Once(Generic[T]):
    """Work that the first calling thread does; every caller gets its outcome.

    An executor that could not create a thread keeps the work queued, and an existing thread may still run it.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def __call__(self) -> T:
        with self._lock:
            if not self._outcome.done():
                try:
                    self._outcome.set_result(self._work())
                except BaseException as error:  # noqa: BLE001  # raised by `result`
                    self._outcome.set_exception(error)
        return self._outcome.result()


def private_folder(path: Path) -> None:
    """Create a private folder, and missing folders above it, for this user only, whatever the umask.

    A folder of this user that exists becomes private. New names survive a loss of power, as do all that this module
    creates. Raises OSError.
    """
    for place in (*reversed(path.parents), path):
        if not place.exists():
            place.mkdir(mode=0o700, exist_ok=True)
            place.chmod(0o700)  # the umask may have removed more
            sync_folder(place.parent)
    make_private(path)


def private_data_dir(path: Path) -> None:
    """Create a data directory for this user only; one that exists becomes private if all in it belongs to this user.

    Called when an engine prepares to start. Raises OSError.
    """
    has_only_our_entries = path.is_dir() and all(_IN_A_DATA_DIR.fullmatch(entry.name) for entry in path.iterdir())
    if has_only_our_entries or not path.is_dir():
        private_folder(path)


def make_private(path: Path) -> None:
    """Remove all other users' permissions on a file or folder of this user. Raises OSError."""
    if sys.platform == "win32":
        return
    status = path.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        path.chmod(stat.S_IMODE(status.st_mode) & 0o700)


def sync_folder(path: Path) -> None:
    """Sync a folder, so that renames in it survive a loss of power, where the system supports it."""
    if os.name == "nt":
        return
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in _NOT_SYNCED:
            raise


def sync_tree(root: Path) -> None:
    """Sync every file and folder below `root`, but no links, to the disk. Raises OSError.

    Several threads sync concurrently, so that the disk writes many files at once: 0.4 s instead of 10 s for the 1,900
    files of an engine on ext4.
    """
    files: list[Path] = []
    folders: list[Path] = []
    for here, _, names in os.walk(root, onerror=_raise):
        folders.append(Path(here))
        files += [path for path in map(Path(here).joinpath, names) if stat.S_ISREG(path.lstat().st_mode)]
    try:
        with concurrent.futures.ThreadPoolExecutor(_SYNCING) as pool:
            list(pool.map(_sync, files))
    except RuntimeError:  # the system refuses another thread
        for path in files:
            _sync(path)
    for folder in folders:
        sync_folder(folder)


def _sync(path: Path) -> None:
    writing = os.name == "nt"  # which flushes only writable files
    descriptor = os.open(path, os.O_RDWR if writing else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise(error: OSError) -> NoReturn:
    raise error


def write_json(path: Path, value: dict[str, Any], scratch: Path) -> None:
    """Write a JSON file as by `write_whole`."""
    write_whole(path, json.dumps(value, indent=1).encode(), scratch)


def write_whole(path: Path, content: bytes, scratch: Path) -> None:
    """Write a private file atomically; it is on the disk when this returns.

    `scratch` is a folder of the same file system. Raises OSError.
    """
    temporary = scratch / f"{path.name}.{os.getpid()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None for a missing or unreadable file or another value."""
    try:
        value = load_json(path)
    except (OSError, JsonError):
        return None
    return value if isinstance(value, dict) else None


def load_json(path: Path) -> Any:
    """The JSON value in a file. Blocks. Raises OSError, and JsonError for invalid JSON or too large a file."""
    with path.open("rb") as file:
        return jsontext.read_json(file.read(LARGEST_JSON + 1), LARGEST_JSON)


@asynccontextmanager
async def opened(path: Path, below: Path | None = None) -> AsyncIterator[FileIO]:
    """Open a file to be read in threads. It is closed in any case, also if the caller is cancelled during the open.

    The file must be in the folder `below`, even if that changes meanwhile: no link below it is followed. Raises
    OSError, also for anything but a regular file.
    """
    with ExitStack() as files:
        yield await in_thread(lambda: files.enter_context(_open_file(path, below)))


def _open_file(path: Path, below: Path | None) -> FileIO:
    if below is None or os.open not in os.supports_dir_fd:  # Windows
        descriptor = os.open(path, _READ)
    else:
        descriptor = _open_below(below, path.relative_to(below).parts)
    file = os.fdopen(descriptor, "rb", buffering=0)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def _open_below(folder: Path, parts: Sequence[str]) -> int:
    """Open a file step by step from a folder's descriptor."""
    here = os.open(folder, _FOLDER)
    try:
        for name in parts[:-1]:
            here, last = os.open(name, _FOLDER | _NO_LINK, dir_fd=here), here
            os.close(last)
        return os.open(parts[-1], _READ | _NO_LINK, dir_fd=here)
    finally:
        os.close(here)


async def take_lock(
    path: Path, waiting: Callable[[], None], within: float = math.inf
) -> AcquireReturnProxy[FileLock]:
    """Lock the file `path` against other processes; the context manager that is returned releases it.

    `waiting` is called once if another one holds the lock. Raises TimeoutError after `within` seconds.
    """
    from filelock import FileLock, Timeout  # not before the handshake

    lock = FileLock(path, mode=0o600, thread_local=False)
    give_up = time.monotonic() + within
    is_first = True
    while True:
        try:
            return lock.acquire(blocking=False)
        except Timeout:
            if time.monotonic() > give_up:
                raise
        if is_first:
            is_first = False
            waiting()
        await asyncio.sleep(_LOCK_PAUSE)


async def sha256_of(path: Path) -> str:
    """`sha256:…` of a file, read block by block in threads. Raises OSError."""
    digest = hashlib.sha256()
    async with opened(path) as file:
        await hash_rest(file, digest)
    return f"sha256:{digest.hexdigest()}"


async def hash_rest(file: FileIO, *digests: hashlib._Hash) -> int:
    """Hash the rest of an open file, block by block in threads. Returns the bytes that it has. Raises OSError."""

    def step() -> int:
        block = file.read(BLOCK)
        for digest in digests:
            digest.update(block)
        return len(block)

    size = 0
    while read := await in_thread(step):
        size += read
    return size
