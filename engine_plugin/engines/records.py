"""Which engine processes are ours: a record per process, so that what a crash left behind is ended, and no other.

A record names the engine process (pid and creation time), a token that is also in its environment, and the
plugin process that owns it. It is reaped only when that owner is gone and the process matches in all three.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from typing import TYPE_CHECKING

import psutil

from engine_plugin.engines import tree

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["TOKEN_VARIABLE", "ProcessRecords"]

log = logging.getLogger(__name__)

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
        scratch.write_text(json.dumps(record))
        scratch.replace(self._path(pid))

    def remove(self, pid: int) -> None:
        """Forget a process whose end is confirmed."""
        self._path(pid).unlink(missing_ok=True)

    def reap(self) -> list[int]:
        """Kill what dead owners left behind; return the pids. Blocks for some milliseconds a record."""
        killed = []
        for path in self.folder.glob("*.json") if self.folder.is_dir() else ():
            try:
                record = json.loads(path.read_text())
                pid, created = int(record["pid"]), float(record["created"] or 0)
                owner, owner_created = int(record["owner"]), float(record["owner_created"] or 0)
                token = str(record["token"])
            except (OSError, ValueError, KeyError, TypeError):
                log.warning("unreadable process record %s: removing it", path.name)
                path.unlink(missing_ok=True)
                continue
            if tree.same_process(owner, owner_created):
                continue
            if tree.same_process(pid, created) and _has_token(pid, token):
                log.warning("engine process %d outlived its plugin %d: killing it", pid, owner)
                tree.kill_tree(pid)
                killed.append(pid)
            path.unlink(missing_ok=True)
        return killed

    def _path(self, pid: int) -> Path:
        return self.folder / f"{pid}.json"


def _has_token(pid: int, token: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).environ().get(TOKEN_VARIABLE) == token
    return False
