"""Private directories for unix sockets, the plugin's and its engine's. POSIX only.

grpcio and llama.cpp create sockets with mode 0755, so these are put in private directories. A plugin that was killed
leaves its directories; the next one removes them. The owner holds a lock on the directory itself, which the kernel
releases with the process: unlike a recorded pid it cannot be reused, and it works between containers that share a
temporary directory. systemd-tmpfiles skips a locked directory with all that is in it
(systemd.io/TEMPORARY_DIRECTORIES); for cleaners that look at times only, the owner touches it (`keep_fresh`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.errors import EnginePluginError
from engine_plugin.system.addresses import SOCKET_PATH_LIMIT

if sys.platform == "win32":
    raise ImportError("unix sockets are not served on Windows")

import fcntl
import grp

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["give_to_group", "keep_fresh", "private_directory", "remove_stale"]

_PREFIX = "engine-plugin-"
_OURS = re.compile(r"sock|[0-9a-f]+\.(sock|key)")
_SETTLED = 10.0  # seconds, after which the owner of a new directory has locked it


@contextlib.contextmanager
def private_directory(base: str, group: str, *, longest: str = "sock", again: Path | None = None) -> Iterator[Path]:
    """Create a directory below `base` (empty: the temporary directory) for this user and `group`, and remove it.

    Stale directories are removed first. `longest` is the longest name of a socket in it. `again` is a directory
    created earlier and removed meanwhile: the new one gets its path. Raises EnginePluginError, which names the
    variable that the host must change.
    """
    parent = Path(base or tempfile.gettempdir()).absolute()
    variable = "PLUGIN_UNIX_SOCKET_DIR" if base else "TMPDIR"
    size = len(os.fsencode(parent / f"{_PREFIX}xxxxxxxx" / longest))  # as tempfile names it
    if size > SOCKET_PATH_LIMIT:
        raise EnginePluginError(
            f"the path of a socket in {parent} would have {size} bytes, and the system allows {SOCKET_PATH_LIMIT}. "
            f"Set {variable} to a shorter directory."
        )
    remove_stale(parent)
    try:
        if again is None:
            directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        else:
            directory = again
            directory.mkdir(mode=0o700)
    except OSError as error:
        raise EnginePluginError(
            f"cannot make a directory for the socket in {parent}: {error.strerror}. "
            f"Set {variable} to a directory that this user can write."
        ) from error
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(_remove, directory)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        cleanup.callback(os.close, lock)
        with contextlib.suppress(OSError):  # a file system without locks, where no directory is seen as stale
            fcntl.flock(lock, fcntl.LOCK_EX)
        if group:
            give_to_group(directory, group, 0o750)
        yield directory


async def keep_fresh(directory: Path, interval: float = 3600.0) -> None:
    """Touch the directory and its files periodically until cancelled. Called by its owner."""
    while True:
        await asyncio.sleep(interval)
        _touch(directory)


def _touch(directory: Path) -> None:
    with contextlib.suppress(OSError):  # removed meanwhile
        for path in [directory, *directory.iterdir()]:
            os.utime(path)


def give_to_group(path: Path, group: str, mode: int) -> None:
    """Give `path` to the group (a name or a number) with `mode`. Raises EnginePluginError."""
    try:
        gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
        os.chown(path, -1, gid)
        path.chmod(mode)
    except KeyError as error:
        raise EnginePluginError(
            f"PLUGIN_UNIX_SOCKET_GROUP is {group!r}, which is no group of this system. "
            "Name an existing group, or give its number, in the host's settings."
        ) from error
    except (OSError, OverflowError) as error:
        raise EnginePluginError(
            f"cannot give {path} to the group {group} of PLUGIN_UNIX_SOCKET_GROUP: {error}. "
            "The plugin's user must be a member of that group."
        ) from error


def remove_stale(parent: Path) -> int:
    """Remove the stale directories of this user's plugins below `parent`; returns their number."""
    removed = 0
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX) and _is_stale(Path(entry.path)):
                _remove(Path(entry.path))
                removed += 1
    return removed


def _is_stale(directory: Path) -> bool:
    """Whether it is a directory of this user that holds only this module's files, is not locked, and is not new."""
    try:
        info = directory.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            return False
        if time.time() - info.st_mtime < _SETTLED or not all(_OURS.fullmatch(p.name) for p in directory.iterdir()):
            return False
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _remove(directory: Path) -> None:
    """Remove only what this package created; foreign files stay."""
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink()
        directory.rmdir()
