"""Which engine processes are ours: a record per process, so that what a crash left behind is ended, and no other.

Every engine process has a token of its own in its environment, which its offspring inherits wherever it goes. A
record names the process (pid, start), the token, the plugin process that owns it, and the place, a boot and a pid
namespace, in which these numbers mean anything. When the owner is gone, `reap` ends the recorded process with its
tree, if pid, start and token all match, and every other process that bears the token. What bears no token of ours,
or an owner's who lives, is not ours and is never touched.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.process import tree
from engine_plugin.system.files import private_folder, write_json

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

__all__ = ["KILL_CONFIRM", "TOKEN_VARIABLE", "ProcessRecords", "ProcessTicket"]

log = logging.getLogger(__name__)

KILL_CONFIRM = 5.0
"""Seconds within which a killed process has ended. Tests set it."""

_KILL_PAUSE = 0.01
_FORGOTTEN = 30 * 86400.0  # seconds; the record of a boot or container that is no more

TOKEN_VARIABLE = "ENGINE_PLUGIN_TOKEN"  # noqa: S105  # a name of a variable, and the token is no secret


class ProcessTicket:
    """What makes one engine process, its successors after a restart, and their offspring recognisable.

    Made by `ProcessRecords.ticket`, one for each `EngineProcess`.
    """

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_hex(16)
        self._folder = folder

    @property
    def environ(self) -> dict[str, str]:
        """The part of the process's environment by which it and its descendants are found."""
        return {TOKEN_VARIABLE: self.token}

    def add(self, pid: int) -> None:
        """Record a process that was just spawned with `environ`. Raises OSError."""
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
        """Forget a process whose end, with that of its offspring, is confirmed. Raises OSError."""
        self.path(pid).unlink(missing_ok=True)

    def stragglers(self) -> list[psutil.Process]:
        """Every live process that bears the token, wherever it is. Blocks for milliseconds: call it in a thread."""
        return _bearers({self.token}).get(self.token, [])

    def path(self, pid: int) -> Path:
        """The record of one process."""
        return self._folder / f"{pid}-{self.token[:8]}.json"  # two containers may have the same pids


class ProcessRecords:
    """The records below one directory (created 0700). Owned by an engine driver."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ticket(self) -> ProcessTicket:
        """A new ticket, whose records are kept here."""
        return ProcessTicket(self.folder)

    def reap(self) -> list[int]:
        """Kill what dead owners left behind and confirm it; return the pids. Blocks: call it in a thread.

        The record of something that could not be ended stays, for the next time.
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
        """The records made here, where their numbers mean something; what cannot be read is removed."""
        for path in self.folder.glob("*.json") if self.folder.is_dir() else ():
            try:
                record = _Record(json.loads(path.read_text()))
                if record.place == place():
                    yield path, record
                elif time.time() - path.stat().st_mtime > _FORGOTTEN:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue  # its owner has removed it just now
            except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
                log.warning("unreadable process record %s: removing it", path.name)
                with contextlib.suppress(OSError):  # it may be anything, also a directory
                    path.unlink()


class _Record:
    """What a file says. Raises ValueError, KeyError, TypeError or OverflowError when it is none of ours."""

    def __init__(self, shape: Any) -> None:
        self.pid, self.created = int(shape["pid"]), float(shape["created"] or 0)
        self.owner, self.owner_created = int(shape["owner"]), float(shape["owner_created"] or 0)
        self.token, self.place = str(shape["token"]), str(shape["place"])
        if not (0 < self.pid < 2**31 and 0 < self.owner < 2**31 and self.token):
            raise ValueError("no process has such a number, or such a token")

    def is_orphaned(self) -> bool:
        """Whether the owner is gone."""
        return not tree.same_process(self.owner, self.owner_created)


def _end(records: list[_Record], killed: set[int]) -> Collection[str]:
    """Kill everything that belongs to the records and bears its token, with its tree. Adds the pids to `killed`.
    Returns the tokens of what is left."""
    records_of = {record.token: record for record in records}
    give_up = time.monotonic() + KILL_CONFIRM
    while found := _bearers(records_of):
        for token, processes in found.items():
            record = records_of[token]
            for process in processes:
                if process.pid not in killed:
                    killed.add(process.pid)
                    log.warning("engine process %d outlived its plugin %d: killing it", process.pid, record.owner)
            family = [kin for process in processes for kin in [process, *tree.descendants(process.pid)]]
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

    Those whose environment cannot be read are nobody's: another user's, and on macOS the system's own programs.
    """
    found: dict[str, list[psutil.Process]] = {}
    for pid in tree.pids():
        with contextlib.suppress(psutil.Error, OSError):
            if pid != os.getpid() and _token_of(pid) in tokens:
                process = psutil.Process(pid)  # from here on the number cannot pass to another unnoticed,
                token = _token_of(pid)  # so it is this very process that bears the token
                if token in tokens and tree.is_alive(process):
                    found.setdefault(token, []).append(process)
    return found


if sys.platform == "linux":
    _IN_ENVIRON = b"\0" + TOKEN_VARIABLE.encode() + b"="

    def _token_of(pid: int) -> str:
        """The token that a process bears, or "". Read directly, in a third of psutil's time."""
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:  # noqa: PTH123  # as fast as can be
            after = (b"\0" + file.read()).partition(_IN_ENVIRON)[2]
        return after.partition(b"\0")[0].decode("ascii", "replace")

    def place() -> str:
        """The boot and the pid namespace in which pids and start times mean something; "?" where one is hidden."""
        parts = []
        with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:  # noqa: PTH123
            parts.append(file.read().strip())
        with contextlib.suppress(OSError):
            parts.append(os.readlink("/proc/self/ns/pid"))  # noqa: PTH115
        return " ".join(parts) or "?"

else:

    def _token_of(pid: int) -> str:
        """The token that a process bears, or ""."""
        return psutil.Process(pid).environ().get(TOKEN_VARIABLE, "")

    def place() -> str:
        """Elsewhere than on Linux processes are numbered once for the whole machine, and start at a time of day."""
        return sys.platform
