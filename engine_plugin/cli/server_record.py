"""How the commands find the server of a plugin: a private directory with its socket, its record and its lock."""

from __future__ import annotations

import asyncio
import hashlib
import json
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
from engine_plugin.system.files import private_folder, write_json
from engine_plugin.system.trust import distrust

if TYPE_CHECKING:
    from contextlib import ExitStack

    from filelock import FileLock

    from engine_plugin.host import PluginClient
    from engine_plugin.manifest import Manifest

__all__ = ["Rendezvous", "ServerRecord", "is_server_process", "read_record", "record_file"]

# Seconds: how long a server may take to open a new socket, and how often its client looks.
_NEW_SOCKET = 5.0
_LOOK_AGAIN = 0.05
# psutil's start times come from two clocks on some systems; they agree within a second.
_SAME_START = 1.0


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """A server that `serve` runs: its process (with its start time, against reuse of the pid) and its address."""

    pid: int
    started: float
    address: str
    log: str = ""

    @classmethod
    def of_this_process(cls, address: str, log: str) -> ServerRecord:
        """The record of a server in this process. Raises PreconditionError where the system shows no processes."""
        try:
            process = psutil.Process()
            return cls(process.pid, process.create_time(), address, log)
        except (psutil.Error, OSError) as error:
            raise PreconditionError(
                f"the system does not show this process ({error}), so no command could find the server. Mount /proc."
            ) from error


def is_server_process(record: ServerRecord) -> psutil.Process | None:
    """The process of that record, None when it is gone or its pid belongs to another one now."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.started) < _SAME_START
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:  # gone, or somebody else's
        return None


class Rendezvous:
    """The place where the one server of a plugin (its name and data directory) and its clients meet.

    Record and lock lie in the data directory, which no cleaner of temporary files visits, so that a server is found
    though its socket may be gone.
    """

    def __init__(self, manifest: Manifest) -> None:
        # Machines may share a home on the network, but not their processes.
        key = hashlib.sha256(f"{_machine()}{manifest.data_dir}".encode()).hexdigest()[:8]
        self._folder = manifest.data_dir / "run"
        self._stem = self._folder / f"{manifest.provider.name}-{key}"

    @property
    def lock(self) -> FileLock:
        """The lock that a server holds from before its record is written until after it is gone. Waits for nobody.

        Raises DownloadError when there can be no private place for it.
        """
        from filelock import FileLock

        try:
            private_folder(self._folder)
            _check_private(self._folder)
        except OSError as error:
            raise catalogue.DISK_WRITE_REFUSED.error(place=self._folder, reason=error.strerror or error) from error
        return FileLock(self._stem.with_name(f"{self._stem.name}.lock"), timeout=0, mode=0o600)

    def choose(self, cleanup: ExitStack) -> str:
        """An address for the server, which holds the lock: a socket that only its user can reach; it is removed by
        `cleanup`. Called by the server. Raises EnginePluginError.

        It lies in the user's runtime directory when there is one, else in the data directory, or, where the path is
        too long for a socket, in a temporary directory that is locked against cleaners.
        """
        if sys.platform == "win32":
            return "127.0.0.1:0"
        for folder in (_runtime_folder(), self._folder):
            sock = folder / f"{self._stem.name}.sock" if folder is not None else None
            if sock is not None and len(os.fsencode(sock)) <= SOCKET_PATH_LIMIT:
                sock.unlink(missing_ok=True)  # what a killed server left; we hold its lock
                break
        else:
            from engine_plugin.system.socketdir import private_directory

            sock = cleanup.enter_context(private_directory("", "")) / "sock"
        cleanup.callback(sock.unlink, missing_ok=True)
        return f"unix:{sock}"

    def write(self, record: ServerRecord) -> None:
        """Tell the commands where the server is; a reader sees all of it or nothing."""
        write_json(record_file(self._stem), asdict(record), self._folder)

    def forget(self) -> None:
        """The server has ended."""
        record_file(self._stem).unlink(missing_ok=True)

    def is_taken(self) -> bool:
        """Whether a server holds the place, though it may not have written its record yet."""
        from filelock import Timeout

        lock = self.lock
        try:
            lock.acquire()
        except Timeout:
            return True
        lock.release()
        return False

    def find(self) -> ServerRecord | None:
        """The record of the server that runs now. Called by every command that can use one."""
        try:
            _check_private(self._folder)
        except OSError:
            return None
        record = read_record(self._stem)
        return record if record is not None and is_server_process(record) else None

    async def reach(self, record: ServerRecord) -> PluginClient:
        """Connect to the recorded server, which opens a new socket within a moment when its own was removed.

        Raises UnavailableError.
        """
        from engine_plugin.host import connect

        give_up = time.monotonic() + _NEW_SOCKET
        while socket_is_gone(record.address) and time.monotonic() < give_up:
            await asyncio.sleep(_LOOK_AGAIN)
            record = self.find() or record
        return await connect(record.address)


def _runtime_folder() -> Path | None:
    """This program's folder in the user's runtime directory; None when that is missing, or not the user's alone.

    Without one platformdirs names /tmp/runtime-UID, which any user can create, and cleaners empty.
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
    """An identifier of this machine, "" where the system has none."""
    try:
        return Path("/etc/machine-id").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def read_record(stem: Path) -> ServerRecord | None:
    """The server's record, None when there is none or it is no record of ours."""
    try:
        record = ServerRecord(**json.loads(record_file(stem).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    numbers = isinstance(record.pid, int) and isinstance(record.started, int | float)
    return record if numbers and 0 < record.pid < 2**31 and isinstance(record.address, str) else None


def record_file(stem: Path) -> Path:
    """The file of a server's record."""
    return stem.with_name(f"{stem.name}.server")  # *.json there are the records of engines' processes


def _check_private(place: Path) -> None:
    """Raise OSError unless the directory is ours alone, and no other user could put another one in its place.

    A record in it is believed, a socket in it is trusted.
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
