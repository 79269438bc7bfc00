"""Helper programs that answer a JSON line with a JSON line, each in its own process."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["Helper", "helper"]

_ANSWER_LIMIT = 60.0
_LINE_LIMIT = 16 * 1024 * 1024
_EXIT_LIMIT = 5.0


class Helper:
    """A running program. A caller reads the answer to a line before it writes the next."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Use `helper`."""
        if process.stdin is None or process.stdout is None:
            raise ValueError("a process with pipes is needed")
        self._in, self._out = process.stdin, process.stdout

    async def tell(self, shape: Any) -> None:
        """Send a line."""
        self._in.write(json.dumps(shape).encode() + b"\n")
        await self._in.drain()

    async def answer(self) -> Any:
        """Read a line. Raises RuntimeError when the program has ended, TimeoutError after a minute."""
        async with asyncio.timeout(_ANSWER_LIMIT):
            line = await self._out.readline()
        if not line:
            raise RuntimeError("a program of the benchmark ended early; its last words are above")
        return json.loads(line)


@asynccontextmanager
async def helper(module: str, *arguments: str) -> AsyncIterator[Helper]:
    """Run one of the benchmark's modules, with this process's stderr. It has exited when the block is left."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdin=pipe, stdout=pipe, limit=_LINE_LIMIT
    )
    try:
        yield Helper(process)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _EXIT_LIMIT)
        except TimeoutError:
            process.kill()
            await process.wait()
