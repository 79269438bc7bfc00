"""How the commands find the server of a plugin: a private directory with its socket, its record and its lock."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import psutil

from engine_plugin.errors import PreconditionError

if TYPE_CHECKING:
    from filelock import FileLock

    from engine_plugin.manifest import Manifest

__all__ = ["Rendezvous", "ServerRecord", "is_server_process", "read_record", "record_file", "write_record"]

# sun_path holds 108 bytes on Linux and 104 elsewhere, the closing zero included.
_MAX_SOCKET_PATH = 103
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
        """The record of a server in this process."""
        process = psutil.Process()
        return cls(process.pid, process.create_time(), address, log)


def is_server_process(record: ServerRecord) -> psutil.Process | None:
    """The process of that record, None when it is gone or its pid belongs to another one now."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.started) < _SAME_START
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:  # gone, or somebody else's
        return None


class Rendezvous:
    """The place where the one server of a plugin (its name and data directory) and its clients meet."""

    def __init__(self, manifest: Manifest) -> None:
        name = manifest.provider.name
        key = hashlib.sha256(str(manifest.data_dir).encode()).hexdigest()[:8]
        self._stem = f"{name}-{key}"
        self._places = (_runtime_directory(), manifest.data_dir / "run")

    def prepare(self) -> Path:
        """Make the directory, private to us, and return the stem of its files. Called by the server.

        The runtime directory when it can be had and its path is short enough, else the data directory.
        Raises PreconditionError when neither can.
        """
        reasons = []
        for place in self._places:
            stem = place / self._stem
            try:
                if len(os.fsencode(f"{stem}.sock")) > _MAX_SOCKET_PATH and sys.platform != "win32":
                    raise OSError(f"{place}: the path is too long for a socket")
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_private(place)
            except OSError as error:
                reasons.append(str(error))
                continue
            return stem
        raise PreconditionError(f"no private place for the socket: {'; '.join(reasons)}. Use serve --address.")

    @property
    def lock(self) -> FileLock:
        """The lock that a server holds from before its record is written until after it is gone. Waits for nobody.

        Raises PreconditionError as `prepare`.
        """
        from filelock import FileLock

        stem = self.prepare()
        return FileLock(stem.with_name(f"{stem.name}.lock"), timeout=0)

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
        for place in self._places:
            try:
                _check_private(place)
            except OSError:
                continue
            record = read_record(place / self._stem)
            if record is not None and is_server_process(record):
                return record
        return None


def _runtime_directory() -> Path:
    with warnings.catch_warnings():
        # It warns where a Linux session has no runtime directory; its fallback is as good when it is private.
        warnings.simplefilter("ignore")
        return Path(platformdirs.user_runtime_dir("engine-plugin", appauthor=False))


def read_record(stem: Path) -> ServerRecord | None:
    """The server's record, None when there is none or it is no record of ours."""
    try:
        record = ServerRecord(**json.loads(record_file(stem).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    numbers = isinstance(record.pid, int) and isinstance(record.started, int | float)
    return record if numbers and 0 < record.pid < 2**31 and isinstance(record.address, str) else None


def write_record(stem: Path, record: ServerRecord) -> None:
    """Tell the commands where the server is; a reader sees all of it or nothing."""
    draft = stem.with_name(f"{stem.name}.json.new")
    draft.write_text(json.dumps(asdict(record)))
    draft.replace(record_file(stem))


def record_file(stem: Path) -> Path:
    """The file of a server's record."""
    return stem.with_name(f"{stem.name}.json")


def _check_private(place: Path) -> None:
    """Raise OSError unless the directory is ours alone: a record in it is believed, a socket in it is trusted."""
    status = place.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise OSError(f"{place} is not a directory")
    if sys.platform != "win32":
        if status.st_uid != os.geteuid():
            raise OSError(f"{place} belongs to another user")
        if status.st_mode & 0o077:
            raise OSError(f"{place} is open to other users; run: chmod 700 {place}")
