"""The process actor: one owner of one engine subprocess's state.

    stopped ──start──▶ starting ──ready probe──▶ ready ──exit──▶ failed
       ▲                  │  │                     │
       │                stop └──exit, timeout──▶ failed
       │                  ▼                        │
       └────confirmed── stopping ◀───────stop──────┘

One task, `_live`, makes every transition of one life, from spawn to the confirmed end; everyone else only asks
(`ensure_ready`, `stop`) and waits. So a start is shared by all who ask for it, a stop aborts a start, and the
end of the process is noticed once and named with its exit code and its last words.
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

from engine_plugin.engines import tree
from engine_plugin.engines.child import STDERR, STDOUT, ChildProcess
from engine_plugin.errors import EngineStartError, UnavailableError
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    import psutil

__all__ = ["EngineProcess", "ProcessSpec", "ProcessState"]

log = logging.getLogger(__name__)

_TAIL_LINES = 30
_TAIL_SHOWN = 6
_LINE_LIMIT = 2000
_PROBE_FIRST, _PROBE_LAST = 0.01, 0.25
_EFFORT = 0.01  # the share of a processor's time that counts as progress
_DEATH_NOTICE = 0.5


class ProcessState(Enum):
    """Where a life is; see the module's diagram."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """How to run one engine process.

    `ready` asks the process whether it can serve: True, False for not yet, an EnginePluginError for never.
    `start_timeout` is how long it may show no progress (output, or use of the processor), `start_limit`
    bounds the whole start, `stop_timeout` the wait between asking and killing. Seconds.
    `stdin` is written once; stdin then stays open as the sign that the plugin lives, and with `stop_by_stdin`
    closing it is how the process is asked to stop. `on_output` gets the lines of stdout; `on_spawn` and `on_end`
    get the pid. Lines that hold one of `error_marks` are the ones that explain a failure.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    ready: Callable[[], Awaitable[bool]]
    stdin: bytes = b""
    cwd: str | None = None
    start_timeout: float = 60.0
    start_limit: float = 1800.0
    stop_timeout: float = 1.0
    stop_by_stdin: bool = False
    error_marks: tuple[str, ...] = ()
    on_output: Callable[[str], None] = field(default=lambda _line: None)
    on_spawn: Callable[[int], None] = field(default=lambda _pid: None)
    on_end: Callable[[int], None] = field(default=lambda _pid: None)


class EngineProcess:
    """One subprocess that can be started, watched and stopped, any number of times.

    Owned by an engine driver, used from one event loop. `stop` must be awaited before the loop ends.
    """

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.state = ProcessState.STOPPED
        self.pid: int | None = None
        self.failure = ""
        self._life: asyncio.Task[None] | None = None
        self._settled: asyncio.Future[None] | None = None
        self._stop_wanted = asyncio.Event()
        self._progress = asyncio.Event()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._unended: dict[int, bytes] = {}
        self._effort = 0.0
        self.ended = asyncio.Event()
        self.ended.set()

    async def ensure_ready(self) -> None:
        """Start the process unless it is ready, sharing a start that is under way.

        Raises EngineStartError with the exit code and the last lines, or UnavailableError when a stop came in
        between. Cancelling one waiter leaves the start to the others.
        """
        while not self.ended.is_set() and (self._stop_wanted.is_set() or self.state is ProcessState.STOPPING):
            await self.ended.wait()
        if self.state is ProcessState.READY:
            return
        settled = self._settled
        if settled is None or self._life is None or self._life.done():
            settled = self._begin()
        await asyncio.wait({settled})
        settled.result()

    async def stop(self) -> None:
        """Ask, wait, kill if need be, and return when no process of the tree is left. Aborts a start."""
        life = self._life
        if life is None or life.done():
            return
        self._stop_wanted.set()
        await asyncio.wait({life})

    def last_words(self) -> str:
        """The last lines that the process wrote, those that name an error if any do."""
        marked = [line for line in self._tail if any(mark in line for mark in self.spec.error_marks)]
        return " | ".join((marked or list(self._tail))[-_TAIL_SHOWN:])

    def _begin(self) -> asyncio.Future[None]:
        self._stop_wanted.clear()
        self.ended.clear()
        self._tail.clear()
        self._unended = {STDOUT: b"", STDERR: b""}
        self._effort = 0.0
        self.failure = ""
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Whether anyone waits for the outcome of a start is up to them.
        settled.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._settled = settled
        self._enter(ProcessState.STARTING)
        self._life = asyncio.create_task(self._live(), name=f"engine process {self.spec.name}")
        return settled

    def _enter(self, state: ProcessState) -> None:
        log.debug("%s: %s -> %s", self.spec.name, self.state.value, state.value)
        self.state = state

    async def _live(self) -> None:
        try:
            self.failure = await self._one_life()
        except OSError as error:
            self.failure = f"{self.spec.name}: {error}"
        except Exception as error:  # the actor's edge: whoever waits must be told, whatever it was
            log.exception("%s: unexpected error", self.spec.name)
            self.failure = f"{self.spec.name}: unexpected {type(error).__name__}: {error}"
        finally:
            self._finish()

    async def _one_life(self) -> str:
        """From spawn to the confirmed end. Returns why it failed, "" when it ended because a stop was asked for."""
        spec = self.spec
        try:
            child = await ChildProcess.spawn(spec.argv, spec.env, self._hear, stdin=spec.stdin, cwd=spec.cwd)
        except OSError as error:
            return f"{spec.name}: cannot run {error.filename or spec.argv[0]}: {error.strerror or error}"
        self.pid = child.pid
        job: Any = None
        try:
            job = tree.bind_to_us(child.pid)
            spec.on_spawn(child.pid)
            return await self._start(child) or await self._serve(child)
        finally:
            await self._end(child)
            if job is not None:
                job.close()

    async def _start(self, child: ChildProcess) -> str:
        """Probe until ready. Returns why it failed; "" when it is ready or a stop was asked for."""
        probing = asyncio.create_task(self._probe())
        stopping = asyncio.create_task(self._stop_wanted.wait())
        loop = asyncio.get_running_loop()
        latest_end = loop.time() + self.spec.start_limit
        try:
            while True:
                self._progress.clear()
                moved = asyncio.create_task(self._progress.wait())
                patience = max(0.0, min(self.spec.start_timeout, latest_end - loop.time()))
                events: set[asyncio.Future[Any]] = {probing, stopping, child.exited, moved}
                await asyncio.wait(events, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                moved.cancel()
                if stopping.done():
                    return ""
                if child.exited.done():
                    return f"{self.spec.name} ended during its start: {await self._obituary(child)}"
                if probing.done():
                    return await self._probed(probing, child)
                if loop.time() >= latest_end:
                    return self._too_slow(f"not ready after {self.spec.start_limit:g} s", "start_limit")
                if not self._progress.is_set() and not self._worked(child.pid):
                    return self._too_slow(f"no sign of progress for {self.spec.start_timeout:g} s", "start_timeout")
        finally:
            for task in (probing, stopping):
                task.cancel()
            await asyncio.gather(probing, stopping, return_exceptions=True)

    def _worked(self, pid: int) -> bool:
        """Whether the process used its processor since we last looked: a big model loads in silence."""
        before, self._effort = self._effort, tree.processor_seconds(pid)
        return self._effort > before + _EFFORT * self.spec.start_timeout

    def _too_slow(self, what: str, option: str) -> str:
        return (
            f"{self.spec.name}: {what} while starting. Last lines: {self.last_words() or 'none'}. "
            f"Raise engine.{option} in plugin.yaml if this machine is slow"
        )

    async def _probed(self, probing: asyncio.Task[None], child: ChildProcess) -> str:
        error = probing.exception()
        if error is not None:
            # A process that dies breaks its connections a moment before its exit is known.
            await asyncio.wait({child.exited}, timeout=_DEATH_NOTICE)
            if child.exited.done():
                return f"{self.spec.name} ended during its start: {await self._obituary(child)}"
            why = str(error) or type(error).__name__
            return f"{self.spec.name} cannot serve: {why}. Last lines: {self.last_words() or 'none'}"
        self._enter(ProcessState.READY)
        self._settle(None)
        return ""

    async def _probe(self) -> None:
        pause = _PROBE_FIRST
        while not await self.spec.ready():
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _PROBE_LAST)

    async def _serve(self, child: ChildProcess) -> str:
        """Wait for a stop or for the process to end by itself. Returns why it failed, "" after a stop."""
        stopping = asyncio.create_task(self._stop_wanted.wait())
        try:
            events: set[asyncio.Future[Any]] = {stopping, child.exited}
            await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            await asyncio.gather(stopping, return_exceptions=True)
        if self._stop_wanted.is_set():
            return ""
        self._enter(ProcessState.STOPPING)  # at once: nobody may take a dead process for a ready one
        return f"{self.spec.name} died: {await self._obituary(child)}"

    async def _end(self, child: ChildProcess) -> None:
        """Stop what still runs, kill the whole tree, and confirm that it is gone."""
        if self.state is not ProcessState.STOPPING:
            self._enter(ProcessState.STOPPING)
        kin: list[psutil.Process] = []
        try:
            if not child.exited.done():
                kin = tree.descendants(child.pid)  # those who have left the session are lost once their parent ends
                child.close_stdin()
                if not self.spec.stop_by_stdin:
                    tree.ask_to_stop(child.pid)
                await asyncio.wait({child.exited}, timeout=self.spec.stop_timeout)
            if not child.exited.done():
                log.warning("%s did not stop in %g s: killing it", self.spec.name, self.spec.stop_timeout)
        finally:
            if not await child.kill(kin):
                log.error("%s (pid %d) could not be killed", self.spec.name, child.pid)
            try:
                self.spec.on_end(child.pid)
            except OSError as error:
                log.warning("%s has ended, but: %s", self.spec.name, error)

    def _settle(self, error: Exception | None) -> None:
        if self._settled is None or self._settled.done():
            return
        if error is None:
            self._settled.set_result(None)
        else:
            self._settled.set_exception(error)

    def _finish(self) -> None:
        self.pid = None
        if self.failure:
            log.error("%s", self.failure)
        self._enter(ProcessState.FAILED if self.failure else ProcessState.STOPPED)
        self._settle(
            EngineStartError(self.failure)
            if self.failure
            else UnavailableError(f"{self.spec.name} was stopped while it was starting")
        )
        self.ended.set()

    async def _obituary(self, child: ChildProcess) -> str:
        """How the process ended and what it said last."""
        await comes_true(child.drained.wait(), within=_DEATH_NOTICE)  # a grandchild may hold the pipes
        for stream in self._unended:
            self._hear(stream, b"\n")
        code = child.exited.result()
        cause = f"exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                cause = f"{signal.Signals(-code).name} (exit code {code})"
        return f"{cause}. Last lines: {self.last_words() or 'none'}"

    def _hear(self, stream: int, block: bytes) -> None:
        """Take what the process wrote; of a flood only the last lines are looked at, except on stdout."""
        *lines, rest = (self._unended[stream] + block).split(b"\n")
        self._unended[stream] = rest[-_LINE_LIMIT:]
        for line in lines if stream == STDOUT else lines[-_TAIL_LINES:]:
            text = line[:_LINE_LIMIT].decode("utf-8", "replace").strip()
            if text and stream == STDOUT:
                self.spec.on_output(text)
            self._note(text)
        self._progress.set()

    def _note(self, line: str) -> None:
        if line:
            self._tail.append(line)
            log.debug("%s: %s", self.spec.name, line)
