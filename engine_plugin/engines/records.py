"""Which engine processes are ours: a record per process, so that what a crash left behind is ended, and no other.

A record names the engine process (pid and creation time), a token that is also in its environment, and the
plugin process that owns it. It is reaped only when that owner is gone and the process matches in all three. Where
only the engine itself has ended, what it left in its session is recognised by the token.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.engines import tree

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["TOKEN_VARIABLE", "ProcessRecords"]

log = logging.getLogger(__name__)

_KILL_CONFIRM = 5.0
_KILL_PAUSE = 0.01

TOKEN_VARIABLE = "ENGINE_PLUGIN_TOKEN"  # noqa: S105  # a name of a variable, and the token is no secret


class ProcessRecords:
    """The records below one directory (created 0700). Owned by an engine driver."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = secrets.token_hex(16)

    def add(self, pid: int) -> None:
        """Record a process that was just spawned with our token in its environment."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = os.getpid()
        record = {
            "pid": pid,
            "created": tree.start_time(pid),
            "token": self.token,
            "owner": owner,
            "owner_created": tree.start_time(owner),
        }
        scratch = self._path(pid).with_suffix(".new")
        try:
            scratch.write_text(json.dumps(record))
            scratch.replace(self._path(pid))
        except OSError:
            scratch.unlink(missing_ok=True)
            raise

    def remove(self, pid: int) -> None:
        """Forget a process whose end is confirmed."""
        self._path(pid).unlink(missing_ok=True)

    def reap(self) -> list[int]:
        """Kill what dead owners left behind and confirm it; return the pids. Blocks: call it in a thread."""
        killed: list[int] = []
        for path in self.folder.glob("*.json") if self.folder.is_dir() else ():
            try:
                record = _Record(json.loads(path.read_text()))
            except FileNotFoundError:
                continue  # its owner has removed it just now
            except (OSError, ValueError, KeyError, TypeError, OverflowError):
                log.warning("unreadable process record %s: removing it", path.name)
                path.unlink(missing_ok=True)
                continue
            if not tree.same_process(record.owner, record.owner_created):
                killed += _end(record)
                path.unlink(missing_ok=True)
        return killed

    def _path(self, pid: int) -> Path:
        return self.folder / f"{pid}.json"


class _Record:
    """What a file says. Raises ValueError, KeyError, TypeError or OverflowError when it is none of ours."""

    def __init__(self, shape: Any) -> None:
        self.pid, self.created = int(shape["pid"]), float(shape["created"] or 0)
        self.owner, self.owner_created = int(shape["owner"]), float(shape["owner_created"] or 0)
        self.token = str(shape["token"])
        if not (0 < self.pid < 2**31 and 0 < self.owner < 2**31):
            raise ValueError("no process has such a number")


def _end(record: _Record) -> list[int]:
    """End the engine, or, where only it has ended, what it left in its session."""
    if tree.same_process(record.pid, record.created):
        found = [psutil.Process(record.pid)]
    elif tree.start_time(record.pid) is not None:
        found = []  # the number is another's now, so no process of that session is left
    else:
        found = tree.session_members(record.pid)
    victims = [process for process in found if _has_token(process, record.token)]
    for victim in victims:
        log.warning("engine process %d outlived its plugin %d: killing it", victim.pid, record.owner)
    pids = [victim.pid for victim in victims]
    give_up = time.monotonic() + _KILL_CONFIRM
    while victims and time.monotonic() < give_up:
        victims = tree.kill_tree(record.pid, victims, leader_gone=record.pid not in pids)
        time.sleep(_KILL_PAUSE)
    return pids


def _has_token(process: psutil.Process, token: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(TOKEN_VARIABLE) == token
    return False
