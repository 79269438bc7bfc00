"""Private directories for unix sockets: the plugin's own and its engine's. POSIX only.

grpcio makes a socket that everybody may see (0755), and llama.cpp does too, so they lie in a directory of ours
alone. A plugin that was killed leaves its directories; the next one removes them. The owner holds a lock on the
directory itself, which the kernel lets go with the process: unlike a recorded pid it cannot be given to another
process, and it holds between containers that share a temporary directory. systemd-tmpfiles passes over a directory
that is locked so, with all that is in it (systemd.io/TEMPORARY_DIRECTORIES); for cleaners that look at the time only,
the owner has it touched (`keep_fresh`).
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
_SETTLED = 10.0  # seconds, in which a new directory's owner has surely locked it


@contextlib.contextmanager
def private_directory(base: str, group: str, *, longest: str = "sock", again: Path | None = None) -> Iterator[Path]:
    """Make a directory below `base` (empty: the temporary directory) for us and, if given, `group`; then remove it.

    Stale ones are removed first. `longest` is the longest name that a socket in it will have; `again` is a directory
    made earlier, which was removed meanwhile: it gets the same path. Raises
    EnginePluginError naming the variable that the host must change.
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
        with contextlib.suppress(OSError):  # a file system without locks: nobody can take it for stale either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if group:
            give_to_group(directory, group, 0o750)
        yield directory


async def keep_fresh(directory: Path, interval: float = 3600.0) -> None:
    """Touch the directory and what is in it every so many seconds, until this is cancelled. Called by its owner."""
    while True:
        await asyncio.sleep(interval)
        _touch(directory)


def _touch(directory: Path) -> None:
    with contextlib.suppress(OSError):  # removed: there is nothing to keep
        for path in [directory, *directory.iterdir()]:
            os.utime(path)


def give_to_group(path: Path, group: str, mode: int) -> None:
    """Let the group (a name or a number) have `path` with `mode`. Raises EnginePluginError."""
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
    """Remove the directories below `parent` that a plugin of this user made and left; say how many."""
    removed = 0
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX) and _is_stale(Path(entry.path)):
                _remove(Path(entry.path))
                removed += 1
    return removed


def _is_stale(directory: Path) -> bool:
    """Whether it is a directory of this user, with nothing but our files, old enough to be locked, and not locked."""
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
    """Remove what we have made and nothing else; what somebody else put there stays."""
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink()
        directory.rmdir()
