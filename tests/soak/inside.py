"""Reports the inside of a process over a private socket, line by line.

Each line that is written to the socket is answered by one of JSON: the tasks and threads by name; after `deep` also
the live objects by type and the blocks of memory that Python has given out, when all garbage was collected; after
`where` what each task waits for.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import re
import sys
import threading
from collections import Counter
from typing import Any

__all__ = ["tell"]


async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer an observer until it disconnects."""
    try:
        while question := await reader.readline():
            shape: dict[str, Any] = {"where": _where()} if question == b"where\n" else _inside()
            if question == b"deep\n":
                shape |= _objects()
            writer.write(json.dumps(shape).encode() + b"\n")
            await writer.drain()
    finally:
        writer.close()


def _inside() -> dict[str, Any]:
    tasks = Counter(map(_name, asyncio.all_tasks()))
    threads = Counter(re.sub(r"\d+", "N", thread.name) for thread in threading.enumerate())
    return {"tasks": tasks, "threads": threads}


def _name(task: asyncio.Task[Any]) -> str:
    """Its name, else that of its coroutine: asyncio's own names are numbers."""
    name = task.get_name()
    if not name.startswith("Task-"):
        return re.sub(r"\d+", "N", name)
    return str(getattr(task.get_coro(), "__qualname__", "?"))


def _where() -> list[str]:
    """Each task's chain of awaits, outermost first."""
    chains = []
    for task in asyncio.all_tasks():
        steps = [_name(task)]
        inner: Any = task.get_coro()
        while inner is not None:
            frame = getattr(inner, "cr_frame", None) or getattr(inner, "ag_frame", None)
            if frame is not None:
                steps.append(f"{getattr(inner, '__qualname__', '?')}:{frame.f_lineno}")
            elif not hasattr(inner, "cr_await"):
                steps.append(repr(inner)[:200])
            inner = getattr(inner, "cr_await", None) or getattr(inner, "ag_await", None)
        chains.append(" > ".join(steps))
    return sorted(chains)


def _objects() -> dict[str, Any]:
    for _ in range(3):  # what finalizers have let go of is garbage of the next round
        gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what is free counts as ours until then
    blocks = sys.getallocatedblocks()
    kinds = Counter(f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.get_objects())
    return {"objects": kinds.total(), "kinds": kinds, "blocks": blocks}
