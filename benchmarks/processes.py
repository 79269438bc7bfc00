"""The plugins' processes: how they start, and what they take while nothing is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.measures import resident, threads, wakeups
from benchmarks.results import Row
from engine_plugin.errors import EnginePluginError
from engine_plugin.host import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from benchmarks.programs import Program
    from benchmarks.results import Results

__all__ = ["left_alone", "start_round"]

GROUP = "the plugin's process"
PYTHON = "Python alone"
_HANDSHAKE = "start to handshake"
_FIRST_RPC = "start to the first rpc's answer"
_MEMORY = "memory (RSS) when started"
_START_TIMEOUT = 30.0
_WAIT = "import sys; print(flush=True); sys.stdin.read()"


async def start_round(results: Results, programs: Sequence[Program]) -> None:
    """Start Python and each plugin once; nothing is left of them."""
    row = _rows(programs)
    at = results.rounds % len(programs)
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "pass")
    await process.wait()
    alone = _since(began)
    for title in (_HANDSHAKE, _FIRST_RPC):
        results.add(row(title, "ms", "cost"), PYTHON, [alone])
    for program in (*programs[at:], *programs[:at]):
        began = time.perf_counter()
        plugin = await program.spawn()
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                address = (await plugin.handshake()).address
                results.add(row(_HANDSHAKE, "ms", "cost"), program.name, [_since(began)])
                async with await connect(address, timeout=_START_TIMEOUT) as client:
                    await client.get_operate_status()
                    results.add(row(_FIRST_RPC, "ms", "cost"), program.name, [_since(began)])
                    results.add(row(_MEMORY, "MiB", "cost"), program.name, [resident(plugin.pid)])
                    results.add(row("threads when started", "", "cost"), program.name, [threads(plugin.pid)])
                    with contextlib.suppress(EnginePluginError):  # some exit before they answer
                        await client.shutdown()
        finally:
            await plugin.end(2)
    results.add(row(_MEMORY, "MiB", "cost"), PYTHON, [await _python_alone()])


@asynccontextmanager
async def left_alone(results: Results, programs: Sequence[Program], settle: float) -> AsyncIterator[None]:
    """Count how often plugins that are asked for nothing wake up while the block runs (Linux).

    It begins `settle` seconds after their start. Ends them when left.
    """
    async with AsyncExitStack() as cleanup:
        clients = [await cleanup.enter_async_context(await program.launch()) for program in programs]
        await asyncio.sleep(settle)
        before = [wakeups(client.pid) for client in clients]
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        row = _rows(programs)("wake-ups a second when idle", "1/s")
        for program, client, count in zip(programs, clients, before, strict=True):
            if sys.platform == "linux":
                results.add(row, program.name, [(wakeups(client.pid) - count) / took])


def _rows(programs: Sequence[Program]) -> partial[Row]:
    return partial(Row, GROUP, ways=(PYTHON, *(program.name for program in programs)))


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1000


async def _python_alone() -> float:
    """The MiB of a Python that does nothing."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _WAIT, stdin=pipe, stdout=pipe)
    try:
        if process.stdout is not None:
            await process.stdout.readline()
        return resident(process.pid)
    finally:
        process.kill()
        await process.wait()
