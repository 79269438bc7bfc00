"""One run of an engine process, from its spawn to its confirmed end: its output, and how it failed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine_plugin.process import memory
from engine_plugin.process.child import STDERR, STDOUT, ChildProcess
from engine_plugin.process.lines import Lines
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from engine_plugin.process.health import HealthRecord, ProcessorUse

__all__ = ["DEATH_NOTICE", "ProcessRun"]

log = logging.getLogger(__name__)

DEATH_NOTICE = 0.5
"""Seconds within which the exit of a process is known, and its last output has arrived, after a connection to it
broke. Tests set it."""

_TAIL_LINES = 30
_TAIL_SHOWN = 6
_LINE_LIMIT = 2000
_PROBE_FIRST, _PROBE_LAST = 0.01, 0.25
_ECHO = 0.1  # seconds after a probe in which output may be nothing but the echo of it


@dataclass(eq=False, repr=False)
class ProcessRun(ChildProcess):
    """The process of one run, and what is known of it. Made by `EngineProcess` for each start; a request keeps the
    run that it uses, and takes from it why its connection broke.

    `over` is set as soon as the process no longer serves, before it is cleaned up; `failure` then says why, "" after
    a stop. `served` is for how many seconds it served, None if it never did. `exit_code` is that of a process that
    ended by itself, and `lacked_memory` whether it ended for lack of memory.
    """

    name: str
    error_marks: Sequence[str]
    """Lines with one of them explain a failure."""

    on_output: Callable[[str], None]
    """It gets each line of stdout."""

    failure: str = ""
    served: float | None = None
    exit_code: int | None = None
    lacked_memory: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)
    health: HealthRecord | None = None
    """The health checks, while it serves."""

    processor: ProcessorUse = field(init=False)
    """From the spawn on."""

    progress_at: float = 0.0
    """When there last was output that is more than the echo of a probe, by the loop's clock."""

    abandoned: asyncio.Future[str] = field(default_factory=asyncio.Future)
    """The reason, once a process that runs must be restarted."""

    _kills: int | None = field(default_factory=memory.kills)
    _tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    _output: dict[int, Lines] = field(
        default_factory=lambda: {STDOUT: Lines(_LINE_LIMIT), STDERR: Lines(_LINE_LIMIT)}
    )
    _echo_until: float = 0.0
    _echoed: bool = False  # whether there was output just after the latest probe
    _echoes: bool = False  # the same of the probe before: only output that follows each of them is an echo

    def last_lines(self) -> str:
        """The last lines of the output, those that name an error if any do; "" without output."""
        marked = [line for line in self._tail if any(mark in line for mark in self.error_marks)]
        return " | ".join((marked or list(self._tail))[-_TAIL_SHOWN:])

    def lines(self) -> list[str]:
        """The last thirty lines of the output, the oldest first."""
        return list(self._tail)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Take output. Of a flood only the last lines are kept, except on stdout."""
        lines = self._output[fd].feed(data)
        for line in lines if fd == STDOUT else lines[-_TAIL_LINES:]:
            if text := line.strip():
                self._tail.append(text)
                log.debug("%s: %s", self.name, text)
                if fd == STDOUT:
                    self.on_output(text)
        now = asyncio.get_running_loop().time()
        is_echo = now <= self._echo_until
        self._echoed = self._echoed or is_echo
        if not (is_echo and self._echoes):
            self.progress_at = now

    async def probe(self, can_serve: Callable[[], Awaitable[bool]]) -> None:
        """Return when `can_serve` is true; raise what it raises. What a server logs for each probe is no progress."""
        loop = asyncio.get_running_loop()
        pause = _PROBE_FIRST
        while True:
            echo = min(_ECHO, pause / 2)
            self._echoes, self._echoed = self._echoed, False
            self._echo_until = loop.time() + echo
            ready = await can_serve()
            self._echo_until = loop.time() + echo
            if ready:
                return
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _PROBE_LAST)

    async def describe_exit(self, needs: int) -> str:
        """How the process ended, with its last lines. `needs` are the bytes of the files that it loads."""
        await comes_true(self.drained.wait(), within=DEATH_NOTICE)  # a grandchild may hold the pipes
        for stream in self._output:
            self.pipe_data_received(stream, b"\n")
        code = self.exit_code = self.exited.result()
        lack = memory.shortage(code, " ".join(self._tail), self._kills, needs)
        self.lacked_memory = bool(lack)
        cause = f"exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                cause = f"{signal.Signals(-code).name} (exit code {code})"
        return f"{cause}. Last lines: {self.last_lines() or 'none'}{f'. {lack}' if lack else ''}"
