"""One life of an engine process: spawn, wait until it can serve, watch it, end it and confirm that it is gone.

`process.process` owns the states and decides what comes after; this module knows how a life goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from engine_plugin.process import memory, tree
from engine_plugin.process.child import STDERR, STDOUT, ChildProcess
from engine_plugin.process.health import HealthPolicy, HealthRecord
from engine_plugin.process.restarts import RestartPolicy
from engine_plugin.system.files import in_thread
from engine_plugin.system.limits import NO_FILES, files_in_use
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    import psutil

__all__ = ["Command", "Life", "ProcessSpec", "ProcessState"]

log = logging.getLogger(__name__)

_TAIL_LINES = 30
_TAIL_SHOWN = 6
_LINE_LIMIT = 2000
_PROBE_FIRST, _PROBE_LAST = 0.01, 0.25
_ECHO = 0.1  # seconds after a probe in which output may be nothing but the echo of it
_EFFORT = 0.01  # the share of a processor's time that counts as progress
_DEATH_NOTICE = 0.5


class ProcessState(Enum):
    """What an engine process is doing; the diagram is in `process.process`."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    RECOVERING = "recovering"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Command:
    """What to run. `stdin` is written once; stdin then stays open as the sign that the plugin lives."""

    argv: Sequence[str]
    env: Mapping[str, str]
    stdin: bytes = b""
    cwd: str | None = None


def _no_stragglers() -> list[psutil.Process]:
    return []


def _nothing() -> bool:
    return False


def _not_lost() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """How to run one engine process, life after life. Seconds.

    `command` is asked once a life, so that each may have a port of its own. `ready` asks the process whether it
    can serve: True, False for not yet, an EnginePluginError for never. `healthy` asks one that serves whether it
    still answers; it bounds itself. `heard` says whether anything came from it by another way since it was last asked
    for: one that streams an answer lives, whatever it makes of the questions about its health.
    `start_timeout` is how long a start may show no progress (output, or use of the processor), `start_limit`
    bounds the whole start, `stop_timeout` the wait between asking and killing. With `stop_by_stdin` closing stdin
    is how the process is asked to stop. `on_output` gets the lines of stdout; `on_spawn` and `on_end` get the pid.
    `lost` says why a process that serves is of no use, "" while it is: it is started anew then.
    `needs` are the bytes of the files that it loads. `stragglers` finds, in a thread, offspring that has left the
    tree. Lines that hold one of `error_marks` are the ones that explain a failure.
    """

    name: str
    command: Callable[[], Command]
    ready: Callable[[], Awaitable[bool]]
    healthy: Callable[[], Awaitable[bool]] | None = None
    heard: Callable[[], bool] = _nothing
    start_timeout: float = 60.0
    start_limit: float = 1800.0
    stop_timeout: float = 1.0
    stop_by_stdin: bool = False
    health: HealthPolicy = field(default=HealthPolicy())
    restart: RestartPolicy = field(default=RestartPolicy())
    error_marks: tuple[str, ...] = ()
    on_output: Callable[[str], None] = field(default=lambda _line: None)
    on_spawn: Callable[[int], None] = field(default=lambda _pid: None)
    on_end: Callable[[int], None] = field(default=lambda _pid: None)
    stragglers: Callable[[], list[psutil.Process]] = _no_stragglers
    lost: Callable[[], str] = _not_lost
    needs: int = 0


class Life:
    """From spawn to the confirmed end. Made and run once, by EngineProcess.

    `enter` is told each state as it begins: READY, DEGRADED, STOPPING. `over` is set as soon as the process no
    longer serves, before it is cleaned up; `failure` then says why, "" after a stop. `exit_code` is that of a process
    that ended by itself, `lacked_memory` whether it had too little. `served` is for how many seconds it did serve,
    None if it never did.
    """

    def __init__(self, spec: ProcessSpec, stop_wanted: asyncio.Event, enter: Callable[[ProcessState], None]) -> None:
        self.pid: int | None = None
        self.failure = ""
        self.served: float | None = None
        self.exit_code: int | None = None
        self.lacked_memory = False
        self.over = asyncio.Event()
        self._spec = spec
        self._stop_wanted = stop_wanted
        self._enter = enter
        self._loop = asyncio.get_running_loop()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._unended = {STDOUT: b"", STDERR: b""}
        self._progress = asyncio.Event()
        self._echo_until = 0.0
        self._echoed = False  # whether something was heard just after the latest probe
        self._echoes = False  # the same of the probe before: only what follows each of them is an echo
        self._effort = 0.0
        self._health: HealthRecord | None = None
        self._asking = asyncio.Lock()
        self._lost = asyncio.Event()
        self._kills: int | None = None

    async def run(self) -> None:
        """Live. Raises nothing but CancelledError, which ends the process too."""
        try:
            self.failure = await self._live()
        except OSError as error:
            self.failure = f"{self._spec.name}: {files_in_use(error) if error.errno in NO_FILES else error}"
        except Exception as error:  # the edge of a life: whoever waits must be told, whatever it was
            log.exception("%s: unexpected error", self._spec.name)
            self.failure = f"{self._spec.name}: unexpected {type(error).__name__}: {error}"
        finally:
            self.over.set()

    def last_words(self) -> str:
        """The last lines that the process wrote, those that name an error if any do."""
        marked = [line for line in self._tail if any(mark in line for mark in self._spec.error_marks)]
        return " | ".join((marked or list(self._tail))[-_TAIL_SHOWN:])

    def lines(self) -> list[str]:
        """What the process wrote last, some thirty lines, the oldest first."""
        return list(self._tail)

    async def check(self) -> None:
        """Ask a serving process how it is, now; its state follows from the latest answers, not from this alone.

        One that cannot be reached any more serves no longer when this returns.
        """
        if self._health is not None and self._spec.lost():
            self._lost.set()
            await self.over.wait()
        else:
            await self._ask()

    async def _ask(self) -> None:
        healthy, health = self._spec.healthy, self._health
        if healthy is None or health is None:
            return
        joins = self._asking.locked()
        async with self._asking:
            if joins:
                return  # somebody's question has just been answered for both
            answered = await healthy()
            if self._health is not health:
                return  # it serves no more
            before = health.degraded
            health.note(answered=answered, now=self._loop.time())
        if health.degraded is not before:
            self._enter(ProcessState.DEGRADED if health.degraded else ProcessState.READY)

    async def _live(self) -> str:
        """From spawn to the confirmed end. Returns why it failed, "" when it ended because a stop was asked for."""
        spec = self._spec
        command = spec.command()
        try:
            child = await ChildProcess.spawn(
                command.argv, command.env, self._hear, stdin=command.stdin, cwd=command.cwd
            )
        except OSError as error:
            reason = files_in_use(error) if error.errno in NO_FILES else error.strerror or error
            return f"{spec.name}: cannot run {error.filename or command.argv[0]}: {reason}"
        self.pid = child.pid
        self._kills = memory.kills()
        try:
            spec.on_spawn(child.pid)
            self.failure = await self._start(child) or await self._serve(child)
            return self.failure
        finally:
            self._enter(ProcessState.STOPPING)  # at once: nobody may take a dead process for a ready one
            self.over.set()
            await self._end(child)

    # Starting

    async def _start(self, child: ChildProcess) -> str:
        """Probe until ready. Returns why it failed; "" when it is ready or a stop was asked for."""
        probing = asyncio.create_task(self._probe())
        stopping = asyncio.create_task(self._stop_wanted.wait())
        latest_end = self._loop.time() + self._spec.start_limit
        try:
            while True:
                self._progress.clear()
                moved = asyncio.create_task(self._progress.wait())
                patience = max(0.0, min(self._spec.start_timeout, latest_end - self._loop.time()))
                events: set[asyncio.Future[Any]] = {probing, stopping, child.exited, moved}
                await asyncio.wait(events, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                moved.cancel()
                if stopping.done():
                    return ""
                if child.exited.done():
                    return f"{self._spec.name} ended during its start: {await self._obituary(child)}"
                if probing.done():
                    return await self._probed(probing, child)
                if self._loop.time() >= latest_end:
                    return self._too_slow(f"not ready after {self._spec.start_limit:g} s", "start_limit")
                if not self._progress.is_set() and not await self._worked(self._spec.start_timeout):
                    return self._too_slow(f"no sign of progress for {self._spec.start_timeout:g} s", "start_timeout")
        finally:
            for task in (probing, stopping):
                task.cancel()
            await asyncio.gather(probing, stopping, return_exceptions=True)

    async def _worked(self, since: float) -> bool:
        """Whether the process used its processor in the last `since` seconds: a big model loads in silence."""
        before = self._effort
        if self.pid is not None:
            self._effort = await in_thread(tree.processor_seconds, self.pid)  # looks at every process there is
        return self._effort > before + _EFFORT * since

    def _too_slow(self, what: str, option: str) -> str:
        return (
            f"{self._spec.name}: {what} while starting. Last lines: {self.last_words() or 'none'}. "
            f"Raise engine.{option} in plugin.yaml if this machine is slow"
        )

    async def _probed(self, probing: asyncio.Task[None], child: ChildProcess) -> str:
        error = probing.exception()
        if error is not None:
            # A process that dies breaks its connections a moment before its exit is known.
            await asyncio.wait({child.exited}, timeout=_DEATH_NOTICE)
            if child.exited.done():
                return f"{self._spec.name} ended during its start: {await self._obituary(child)}"
            why = str(error) or type(error).__name__
            return f"{self._spec.name} cannot serve: {why}. Last lines: {self.last_words() or 'none'}"
        self._health = HealthRecord(self._spec.health, self._loop.time())
        self._enter(ProcessState.READY)
        return ""

    async def _probe(self) -> None:
        """Ask until it is ready. A server that logs each probe must not pass that for progress."""
        pause = _PROBE_FIRST
        while True:
            echo = min(_ECHO, pause / 2)
            self._echoes, self._echoed = self._echoed, False
            self._echo_until = self._loop.time() + echo
            ready = await self._spec.ready()
            self._echo_until = self._loop.time() + echo
            if ready:
                return
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _PROBE_LAST)

    # Serving

    async def _serve(self, child: ChildProcess) -> str:
        """Wait for a stop, for the process to end by itself, or to hang. Returns why it failed, "" after a stop."""
        if self._stop_wanted.is_set():
            return ""
        began = self._loop.time()
        stopping = asyncio.create_task(self._stop_wanted.wait())
        watching = asyncio.create_task(self._watch())
        try:
            events: set[asyncio.Future[Any]] = {stopping, watching, child.exited}
            await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.served = self._loop.time() - began
            self._health = None
            for task in (stopping, watching):
                task.cancel()
            await asyncio.gather(stopping, watching, return_exceptions=True)
        if self._stop_wanted.is_set():
            return ""
        if child.exited.done():
            self._enter(ProcessState.STOPPING)
            return f"{self._spec.name} died: {await self._obituary(child)}"
        return watching.result()

    async def _watch(self) -> str:
        """Ask again and again. Returns only when the process is hung, with the words for it."""
        health, policy = self._health, self._spec.health
        if health is None or self._spec.healthy is None:
            await self._lost.wait()
            return self._lost_words()
        looked = False  # what it had computed by then is known only from the second look in a row on
        while True:
            self._progress.clear()
            if await comes_true(self._lost.wait(), within=policy.interval) or self._spec.lost():
                return self._lost_words()
            await self._ask()
            heard = self._spec.heard()
            if health.silent:
                worked = await self._worked(policy.interval)
                if heard or self._progress.is_set() or (worked and looked):
                    health.alive(self._loop.time())
            looked, known = health.silent, looked
            if known and health.hung(self._loop.time()):
                return (
                    f"{self._spec.name} hangs: no answer, output or use of the processor for "
                    f"{policy.hung_after:g} s. Last lines: {self.last_words() or 'none'}"
                )

    def _lost_words(self) -> str:
        return f"{self._spec.name} is given up: {self._spec.lost() or 'what led to it was removed'}"

    # Ending

    async def _end(self, child: ChildProcess) -> None:
        """Stop what still runs, kill the whole tree, and confirm that it is gone."""
        kin: list[psutil.Process] = []
        try:
            if not child.exited.done():
                kin = tree.descendants(child.pid)  # those who have left the session are lost once their parent ends
                child.close_stdin()
                if not self._spec.stop_by_stdin:
                    tree.ask_to_stop(child.pid)
                await asyncio.wait({child.exited}, timeout=self._spec.stop_timeout)
            if not child.exited.done():
                log.warning("%s did not stop in %g s: killing it", self._spec.name, self._spec.stop_timeout)
        finally:
            if not await child.kill(kin, self._spec.stragglers):
                log.error("%s (pid %d) could not be killed", self._spec.name, child.pid)
            try:
                self._spec.on_end(child.pid)
            except OSError as error:
                log.warning("%s has ended, but: %s", self._spec.name, error)

    async def _obituary(self, child: ChildProcess) -> str:
        """How the process ended and what it said last."""
        await comes_true(child.drained.wait(), within=_DEATH_NOTICE)  # a grandchild may hold the pipes
        for stream in self._unended:
            self._hear(stream, b"\n")
        code = self.exit_code = child.exited.result()
        lack = memory.shortage(code, " ".join(self._tail), self._kills, self._spec.needs)
        self.lacked_memory = bool(lack)
        cause = f"exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                cause = f"{signal.Signals(-code).name} (exit code {code})"
        return f"{cause}. Last lines: {self.last_words() or 'none'}{f'. {lack}' if lack else ''}"

    # What it says

    def _hear(self, stream: int, block: bytes) -> None:
        """Take what the process wrote; of a flood only the last lines are looked at, except on stdout."""
        *lines, rest = (self._unended[stream] + block).split(b"\n")
        self._unended[stream] = rest[-_LINE_LIMIT:]
        for line in lines if stream == STDOUT else lines[-_TAIL_LINES:]:
            text = line[:_LINE_LIMIT].decode("utf-8", "replace").strip()
            if text and stream == STDOUT:
                self._spec.on_output(text)
            self._note(text)
        if self._loop.time() <= self._echo_until:
            self._echoed = True
            if self._echoes:
                return
        self._progress.set()

    def _note(self, line: str) -> None:
        if line:
            self._tail.append(line)
            log.debug("%s: %s", self._spec.name, line)
