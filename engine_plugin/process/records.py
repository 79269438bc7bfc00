"""A record of each engine process, by which the processes that a crashed plugin left are found and ended.

Each engine process has a token of its own in its environment, which all its descendants inherit. A record has the
process (pid, start), the token, the plugin process that owns it, and the place, a boot and a pid namespace, in which
these numbers are valid. When the owner has ended, `reap` ends the recorded process with its tree, if pid, start and
token match, and each other process with the token. Processes without a recorded token, and those of a plugin that
runs, are not touched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.process import tree
from engine_plugin.system.files import load_json, private_folder, write_json

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

__all__ = ["KILL_CONFIRM", "TOKEN_VARIABLE", "ProcessRecords", "ProcessTicket"]

log = logging.getLogger(__name__)

KILL_CONFIRM = 5.0
"""Seconds within which a killed process has ended. Tests set it."""

_KILL_PAUSE = 0.01
_FORGOTTEN = 30 * 86400.0  # seconds; the record of an earlier boot or a removed container

TOKEN_VARIABLE = "ENGINE_PLUGIN_TOKEN"  # noqa: S105  # a name of a variable, and the token is no secret
"""The variable with the token, by which the process and its descendants are found."""


class ProcessTicket:
    """The token of one engine process, of its restarts and of their descendants, with the record of each run.

    Made by `ProcessRecords.ticket`, one for each `EngineProcess`.
    """

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_hex(16)
        self._folder = folder

    def add(self, pid: int) -> None:
        """Write the record of a process that was just spawned, with the token in its environment. Raises OSError."""
        private_folder(self._folder)
        owner = os.getpid()
        record = {
            "pid": pid,
            "created": tree.start_time(pid),
            "token": self.token,
            "owner": owner,
            "owner_created": tree.start_time(owner),
            "place": place(),
        }
        write_json(self.path(pid), record, self._folder)

    def remove(self, pid: int) -> None:
        """Remove the record of a process whose tree has ended. Raises OSError."""
        self.path(pid).unlink(missing_ok=True)

    def stragglers(self) -> list[psutil.Process]:
        """Each live process with the token. Blocks for milliseconds: call it in a thread."""
        return _bearers({self.token}).get(self.token, [])

    def path(self, pid: int) -> Path:
        """The record of one process."""
        return self._folder / f"{pid}-{self.token[:8]}.json"  # two containers may have the same pids


class ProcessRecords:
    """The records below one directory (created 0700). Owned by an engine driver."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ticket(self) -> ProcessTicket:
        """A new ticket with its records in this directory."""
        return ProcessTicket(self.folder)

    def reap(self) -> list[int]:
        """Kill the processes that dead owners left; return their pids. Blocks: call it in a thread.

        The record of a process that could not be killed stays for the next time.
        """
        orphaned = {path: record for path, record in self._read() if record.is_orphaned()}
        killed: set[int] = set()
        if orphaned:
            left = _end(list(orphaned.values()), killed)
            for path, record in orphaned.items():
                if record.token not in left:
                    path.unlink(missing_ok=True)
        return sorted(killed)

    def _read(self) -> Iterator[tuple[Path, _Record]]:
        """The records of this place; unreadable ones are removed."""
        for path in self.folder.glob("*.json") if self.folder.is_dir() else ():
            try:
                record = _Record(load_json(path))
                if record.place == place():
                    yield path, record
                elif time.time() - path.stat().st_mtime > _FORGOTTEN:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue  # its owner has just removed it
            except (OSError, ValueError, KeyError, TypeError, OverflowError):
                log.warning("unreadable process record %s: removing it", path.name)
                with contextlib.suppress(OSError):  # it may be a directory
                    path.unlink()


class _Record:
    """The content of a record. Raises ValueError, KeyError, TypeError or OverflowError for any other JSON."""

    def __init__(self, shape: Any) -> None:
        self.pid, self.created = int(shape["pid"]), float(shape["created"] or 0)
        self.owner, self.owner_created = int(shape["owner"]), float(shape["owner_created"] or 0)
        self.token, self.place = str(shape["token"]), str(shape["place"])
        if not (0 < self.pid < 2**31 and 0 < self.owner < 2**31 and self.token):
            raise ValueError("not a valid pid or token")

    def is_orphaned(self) -> bool:
        """Whether the owner has ended."""
        return not tree.same_process(self.owner, self.owner_created)


def _end(records: list[_Record], killed: set[int]) -> Collection[str]:
    """Kill the processes with the tokens of `records`, with their trees. Adds their pids to `killed`. Returns the
    tokens of those that survived."""
    records_of = {record.token: record for record in records}
    give_up = time.monotonic() + KILL_CONFIRM
    while found := _bearers(records_of):
        for token, processes in found.items():
            record = records_of[token]
            for process in processes:
                if process.pid not in killed:
                    killed.add(process.pid)
                    log.warning("engine process %d outlived its plugin %d: killing it", process.pid, record.owner)
            family = [member for process in processes for member in [process, *tree.descendants(process.pid)]]
            if tree.same_process(record.pid, record.created) and record.pid in {process.pid for process in processes}:
                tree.kill_tree(record.pid, family)
            else:
                tree.kill(family)
        if time.monotonic() > give_up:
            break
        time.sleep(_KILL_PAUSE)
    return found


def _bearers(tokens: Collection[str]) -> dict[str, list[psutil.Process]]:
    """The live processes, other than this one, whose environment holds one of the tokens, by token.

    Processes with an unreadable environment are left out: those of other users, and on macOS the system's programs.
    """
    found: dict[str, list[psutil.Process]] = {}
    for pid in tree.pids():
        with contextlib.suppress(psutil.Error, OSError):
            if pid != os.getpid() and _token_of(pid) in tokens:
                process = psutil.Process(pid)  # from here on a reused pid is noticed,
                token = _token_of(pid)  # so it is this process that has the token
                if token in tokens and tree.is_alive(process):
                    found.setdefault(token, []).append(process)
    return found


if sys.platform == "linux":
    _IN_ENVIRON = b"\0" + TOKEN_VARIABLE.encode() + b"="

    def _token_of(pid: int) -> str:
        """The token of a process, or "". Read directly, in a third of psutil's time."""
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:  # noqa: PTH123  # as fast as can be
            after = (b"\0" + file.read()).partition(_IN_ENVIRON)[2]
        return after.partition(b"\0")[0].decode("ascii", "replace")

    def place() -> str:
        """The boot and the pid namespace in which pids and start times are valid; "?" where both are hidden."""
        parts = []
        with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:  # noqa: PTH123
            parts.append(file.read().strip())
        with contextlib.suppress(OSError):
            parts.append(os.readlink("/proc/self/ns/pid"))  # noqa: PTH115
        return " ".join(parts) or "?"

else:

    def _token_of(pid: int) -> str:
        """The token of a process, or ""."""
        return psutil.Process(pid).environ().get(TOKEN_VARIABLE, "")

    def place() -> str:
        """Other systems have one set of pids, and start times by the clock."""
        return sys.platform
