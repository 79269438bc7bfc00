"""How much memory there is for another process, and whether one that ended had too little.

Runs inside engine processes too, so its imports are few and light. Sources: cgroups(7) and the kernel's
cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from engine_plugin.system.sizes import byte_size

__all__ = ["CGROUPS", "PROC", "Room", "address_space", "kills", "room", "shortage"]

CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")
"""Where the kernel shows cgroups and processes. Tests set them."""

_SIGNS = ("bad_alloc", "memoryerror", "cannot allocate memory", "failed to allocate", "out of memory")
"""Words that programs write when an allocation fails, in lower case."""


@dataclass(frozen=True, slots=True)
class Room:
    """Free and total bytes of the machine or of the container (its cgroup), which `whose` names."""

    free: int
    total: int
    whose: str

    def __str__(self) -> str:
        return f"{byte_size(self.free)} of the {self.whose}'s {byte_size(self.total)} are free"


def room() -> Room:
    """The free memory of the machine, or of the tightest cgroup of this process. Reads small files of the kernel."""
    machine = _machine()
    rooms = [machine]
    for group in _groups():
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes")
        if 0 < limit < machine.total:
            stat = _fields(group / "memory.stat")
            cache = sum(
                stat.get(f"total_{kind}_file", stat.get(f"{kind}_file", 0)) for kind in ("inactive", "active")
            )
            rooms.append(Room(max(0, limit - max(0, used - cache)), limit, "container"))
    return min(rooms, key=lambda one: one.free)


def _machine() -> Room:
    try:
        memory = psutil.virtual_memory()
        free = memory.available + (psutil.swap_memory().free if sys.platform == "linux" else 0)
        return Room(free, memory.total, "machine")
    except FileNotFoundError:  # Linux without /proc: what is free is unknown, so all of it counts as free
        if sys.platform == "win32":
            raise
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Room(total, total, "machine")


def address_space() -> int:
    """The most bytes of addresses that a process may have (`ulimit -v`), 0 when that is unlimited."""
    if sys.platform == "win32":
        return 0
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return 0 if limit == resource.RLIM_INFINITY else limit


def kills() -> int | None:
    """How many processes the system has ended for lack of memory, in this cgroup if there is one; None: unknown."""
    for group in _groups():
        for name in ("memory.events", "memory.oom_control"):
            if (count := _fields(group / name).get("oom_kill")) is not None:
                return count
    return _fields(PROC / "vmstat").get("oom_kill")


def shortage(code: int | None, output: str, kills_before: int | None, needs: int = 0) -> str:
    """A sentence about the lack of memory that ended a process, "" when nothing points to one.

    `code` is its exit status (None: it runs), `output` its last output, `kills_before` the `kills` at its start, and
    `needs` the bytes of its model's files.
    """
    count = kills()
    if sys.platform != "win32" and code == -signal.SIGKILL:
        if count is not None and count == kills_before:
            return ""  # another program ended it
        begins = f"It {'may have been' if count is None else 'was'} ended for lack of memory"
    elif any(sign in output.lower() for sign in _SIGNS):
        begins = "It got too little memory"
    else:
        return ""
    facts = [str(room())]
    if limit := address_space():
        facts.append(f"ulimit -v lets each process have {byte_size(limit)} of addresses")
    if needs:
        facts.append(f"the model's files have {byte_size(needs)}")
    return f"{begins}: {'; '.join(facts)}. Take a smaller model, unload others, or raise the limit"


def _groups() -> list[Path]:
    """The folders of the cgroups that limit the memory of this process, innermost first; empty without cgroups."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root = CGROUPS if number == "0" else CGROUPS / "memory"
        here = root / path.lstrip("/")
        # In a container the path may be the host's, of which only the root is visible.
        above = [here, *here.parents] if here.is_dir() else [root]
        found += [folder for folder in above if folder == root or root in folder.parents]
    return found


def _number(path: Path) -> int:
    """The number in a file; 0 for any other content ("max", for one)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _fields(path: Path) -> dict[str, int]:
    """The lines `name number` of a file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, number = line.partition(" ")
        if number.isdecimal():
            found[name] = int(number)
    return found
