"""How this package's helper programs read their stdin and report failures. Imports only the stdlib."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["FAILED", "UNUSABLE", "bound_memory", "fail", "own_stdin", "read_exactly", "read_settings"]

FAILED = 3
UNUSABLE = 65
"""The exit status of a program that cannot load the model that it was given: EX_DATAERR of sysexits.h."""


def fail(text: str, status: int = FAILED) -> NoReturn:
    """End this process: one line on stderr and an exit status. Nothing is cleaned up; the kernel frees everything."""
    sys.stderr.write(f"E {text}\n")
    sys.stderr.flush()
    os._exit(status)


def bound_memory(more: int) -> None:
    """Limit the address space to `more` bytes beyond the current use (Linux). What needs more gets a MemoryError."""
    if sys.platform == "linux":
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + more if most < 0 else min(used + more, most), most))


def own_stdin() -> int:
    """Move stdin to a descriptor of its own and leave the null device in its place; the descriptor.

    Every program that reads its stdin reads this descriptor. On Windows a library that looks at the standard handles
    while it is loaded, as numpy does, waits for a read of stdin in another thread to end: the process would hang
    until its next request. Call it once, before any thread is started. Child processes inherit the null
    device.
    """
    own = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return own


def read_exactly(descriptor: int, count: int) -> bytes:
    """The next `count` bytes of a pipe, waited for. Raises EOFError, OSError at its end."""
    data = bytearray()
    while len(data) < count:
        piece = os.read(descriptor, count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def read_settings(stdin: int) -> dict[str, Any]:
    """The first line of `stdin`, a JSON object, read without a buffer: a later reader sees all that follows it.

    Without a line the process ends.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        data = os.read(stdin, 65536)
        if not data:
            os._exit(0)
        line += data
    settings: dict[str, Any] = json.loads(line)
    return settings
