"""How commands find the server of a plugin: a private directory with its socket, its record and its lock."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from engine_plugin import catalogue
from engine_plugin.errors import PreconditionError
from engine_plugin.system.addresses import SOCKET_PATH_LIMIT, socket_is_gone
from engine_plugin.system.files import load_json, private_folder, write_json
from engine_plugin.system.trust import distrust

if TYPE_CHECKING:
    from contextlib import ExitStack

    from filelock import FileLock

    from engine_plugin.host import PluginClient
    from engine_plugin.manifest import Manifest

__all__ = ["ServerRecord", "ServerRecordStore", "is_server_process", "read_record", "record_file"]

# Seconds: how long a server may take to reopen its socket, and how often its client checks.
_NEW_SOCKET = 5.0
_LOOK_AGAIN = 0.05
# On some systems psutil reads start times from two clocks, which agree within a second.
_SAME_START = 1.0


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """A server of `serve`: its process, with the start time because pids are reused, and its address."""

    pid: int
    started: float
    address: str
    log: str = ""

    @classmethod
    def of_this_process(cls, address: str, log: str) -> ServerRecord:
        """Return the record of this process as a server. Raises PreconditionError without /proc."""
        try:
            process = psutil.Process()
            return cls(process.pid, process.create_time(), address, log)
        except (psutil.Error, OSError) as error:
            raise PreconditionError(
                f"cannot read the start time of this process ({error}), which identifies the server. Mount /proc"
            ) from error


def is_server_process(record: ServerRecord) -> psutil.Process | None:
    """Return the process of a record, None if it has ended or its pid was reused."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.started) < _SAME_START
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:  # ended, or not accessible
        return None


class ServerRecordStore:
    """The files by which clients find the one server of a plugin (identified by its name and data directory).

    Record and lock are in the data directory, which cleaners of temporary files do not touch. So a server is found
    even if its socket was removed.
    """

    def __init__(self, manifest: Manifest) -> None:
        # Several machines can share a home directory, but not processes.
        key = hashlib.sha256(f"{_machine()}{manifest.data_dir}".encode()).hexdigest()[:8]
        self._folder = manifest.data_dir / "run"
        self._stem = self._folder / f"{manifest.provider.name}-{key}"

    @property
    def lock(self) -> FileLock:
        """The lock that a server holds from before it writes its record until after it has removed it. Never blocks.

        Raises DownloadError if its private directory cannot be created.
        """
        from filelock import FileLock

        try:
            private_folder(self._folder)
            _check_private(self._folder)
        except OSError as error:
            raise catalogue.DISK_WRITE_REFUSED.error(place=self._folder, reason=error.strerror or error) from error
        return FileLock(self._stem.with_name(f"{self._stem.name}.lock"), timeout=0, mode=0o600)

    def choose(self, cleanup: ExitStack) -> str:
        """Return an address for the server: a socket that only its user can reach. `cleanup` removes it.

        Called by the server, which holds the lock. The socket is in the user's runtime directory, else in the data
        directory, or, if those paths are too long for a socket, in a temporary directory that is locked against
        cleaners. Raises EnginePluginError.
        """
        if sys.platform == "win32":
            return "127.0.0.1:0"
        for folder in (_runtime_folder(), self._folder):
            sock = folder / f"{self._stem.name}.sock" if folder is not None else None
            if sock is not None and len(os.fsencode(sock)) <= SOCKET_PATH_LIMIT:
                sock.unlink(missing_ok=True)  # left by a killed server: its lock is free
                break
        else:
            from engine_plugin.system.socketdir import private_directory

            sock = cleanup.enter_context(private_directory("", "")) / "sock"
        cleanup.callback(sock.unlink, missing_ok=True)
        return f"unix:{sock}"

    def write(self, record: ServerRecord) -> None:
        """Write the record by which commands find the server, atomically."""
        write_json(record_file(self._stem), asdict(record), self._folder)

    def forget(self) -> None:
        """Remove the record. Called when the server exits."""
        record_file(self._stem).unlink(missing_ok=True)

    def is_taken(self) -> bool:
        """Return whether a server holds the lock, even if it has not written its record yet."""
        from filelock import Timeout

        try:
            with self.lock:
                return False
        except Timeout:
            return True

    def find(self) -> ServerRecord | None:
        """Return the record of the running server, if there is one. Called by every command that can use it."""
        try:
            _check_private(self._folder)
        except OSError:
            return None
        record = read_record(self._stem)
        return record if record is not None and is_server_process(record) else None

    async def reach(self, record: ServerRecord) -> PluginClient:
        """Connect to the recorded server. If its socket was removed, wait until the server has reopened it.

        Raises UnavailableError.
        """
        from engine_plugin.host import connect

        give_up = time.monotonic() + _NEW_SOCKET
        while socket_is_gone(record.address) and time.monotonic() < give_up:
            await asyncio.sleep(_LOOK_AGAIN)
            record = self.find() or record
        return await connect(record.address)


def _runtime_folder() -> Path | None:
    """Return this program's directory in the user's runtime directory; None if that is missing or not private.

    platformdirs would fall back to /tmp/runtime-UID, which any user can create and cleaners empty.
    """
    if sys.platform == "win32":
        return None
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")
    try:
        _check_private(base)
        folder = base / "engine-plugin"
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_private(folder)
    except OSError:
        return None
    return folder


def _machine() -> str:
    """Return an identifier of this machine, "" if the system has none."""
    try:
        return Path("/etc/machine-id").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def read_record(stem: Path) -> ServerRecord | None:
    """Read the server's record; None if it is missing or not a valid record."""
    try:
        record = ServerRecord(**load_json(record_file(stem)))
    except (OSError, ValueError, TypeError):
        return None
    numbers = isinstance(record.pid, int) and isinstance(record.started, int | float)
    return record if numbers and 0 < record.pid < 2**31 and isinstance(record.address, str) else None


def record_file(stem: Path) -> Path:
    """Return the path of the server's record."""
    return stem.with_name(f"{stem.name}.server")  # *.json in that directory are the records of engine processes


def _check_private(place: Path) -> None:
    """Raise OSError unless only this user can access the directory and no other user can replace it.

    Commands connect to the address in its record without further checks.
    """
    status = place.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise OSError(f"{place} is not a directory")
    if sys.platform != "win32":
        if status.st_uid != os.geteuid():
            raise OSError(f"{place} belongs to another user")
        if status.st_mode & 0o077:
            raise OSError(f"{place} is open to other users; run: chmod 700 {place}")
    if doubt := distrust(place):
        raise OSError(str(doubt))
