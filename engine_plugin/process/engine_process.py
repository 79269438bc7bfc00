"""The state machine of an engine process: start it, notice its end, restart it, stop it.

    stopped ──▶ starting ──▶ ready ◀──▶ degraded
       ▲         │    ▲        │            │
       │         ▼    │        ▼            │
       ├───────── stopping ◀────────────────┘
       │          │   │
    failed ◀──────┘   └──▶ recovering ──▶ starting

`MOVES` has every transition, and docs/design.md says when each is made.

One task, `_run`, makes every transition from a start to the stop or the final failure; all other callers only ask
(`ensure_ready`, `stop`, `check`) and wait. So concurrent callers share a start, a stop aborts a start and a back-off,
and each end of a process is noticed once.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import EngineStartError, UnavailableError
from engine_plugin.process import run as process_run
from engine_plugin.process import tree
from engine_plugin.process.health import HealthRecord, ProcessorUse
from engine_plugin.process.limits import ProcessLimits
from engine_plugin.process.records import TOKEN_VARIABLE
from engine_plugin.process.restarts import Restarts
from engine_plugin.process.run import ProcessRun
from engine_plugin.system.limits import NO_FILES, files_in_use

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import psutil

    from engine_plugin.process.records import ProcessTicket

__all__ = ["MOVES", "Command", "EngineProcess", "ProcessLimits", "ProcessState"]

log = logging.getLogger(__name__)


class ProcessState(Enum):
    """What an engine process is doing."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    RECOVERING = "recovering"
    STOPPING = "stopping"
    FAILED = "failed"


MOVES = {
    ProcessState.STOPPED: {ProcessState.STARTING},
    ProcessState.STARTING: {
        ProcessState.READY,
        ProcessState.STOPPING,
        ProcessState.FAILED,
        ProcessState.RECOVERING,
    },
    ProcessState.READY: {ProcessState.DEGRADED, ProcessState.STOPPING},
    ProcessState.DEGRADED: {ProcessState.READY, ProcessState.STOPPING},
    ProcessState.STOPPING: {ProcessState.STOPPED, ProcessState.RECOVERING, ProcessState.FAILED},
    ProcessState.RECOVERING: {ProcessState.STARTING, ProcessState.STOPPED},
    ProcessState.FAILED: {ProcessState.STARTING},
}
"""The states that may follow each state."""

_SERVING = (ProcessState.READY, ProcessState.DEGRADED)


@dataclass(frozen=True, slots=True)
class Command:
    """What to run. `stdin` is written once; stdin then stays open as the sign that the plugin lives."""

    argv: Sequence[str]
    env: Mapping[str, str]
    stdin: bytes = b""


class EngineProcess(ABC):
    """A subprocess that can be started, watched, restarted and stopped, any number of times.

    A subclass overrides the steps. Owned by an engine driver, used from one event loop; `stop` or `close` must be
    awaited before the loop ends.
    """

    def __init__(
        self,
        name: str,
        ticket: ProcessTicket,
        limits: ProcessLimits,
        *,
        error_marks: tuple[str, ...] = (),
        stop_by_stdin: bool = False,
        needs: int = 0,
    ) -> None:
        """`name` stands for it in messages. Lines of output with one of `error_marks` explain a failure. With
        `stop_by_stdin` the end of its stdin asks it to stop, else SIGTERM does. `needs` are the bytes of the files
        that it loads.
        """
        self.name = name
        self.state = ProcessState.STOPPED
        self.failure = ""
        """Why the latest run ended, "" while it serves and after a stop."""
        self.latest_run: ProcessRun | None = None
        self.ended = asyncio.Event()
        """Set while there is no process and none will be started without a call: stopped or failed."""
        self.ended.set()
        self._ticket = ticket
        self._limits = limits
        self._error_marks = error_marks
        self._stop_by_stdin = stop_by_stdin
        self._needs = needs
        self._restarts = Restarts(limits.restart_limit, limits.restart_backoff, limits.stable_time)
        self._task: asyncio.Task[None] | None = None
        # From the first start on:
        self._settled: asyncio.Future[Exception | None]  # the outcome of the present start
        self._stop_wanted: asyncio.Future[None]
        self._closed = False
        self._moved = asyncio.Event()
        self._checking = asyncio.Lock()

    # The steps that a subclass overrides

    @abstractmethod
    def command(self) -> Command:
        """What to run. Called for each run, so that each may have a port of its own."""

    @abstractmethod
    async def can_serve(self) -> bool:
        """Whether a process that starts can serve; False: not yet. Raises EnginePluginError: never."""

    async def is_healthy(self) -> bool:
        """Whether a process that serves answers a health check. The step has a time limit of its own."""
        return True

    def has_answered(self) -> bool:
        """Whether the process has sent anything since the last call, such as a part of an answer.

        A process that streams an answer is not hung, even if it misses health checks.
        """
        return False

    def unusable(self) -> str:
        """Why a process that runs must be restarted, "" if it need not."""
        return ""

    def on_output(self, line: str) -> None:  # noqa: B027  # most engines write nothing that the driver needs
        """Take one line of stdout."""

    # For callers

    @property
    def pid(self) -> int | None:
        """The pid of the process that runs."""
        return self.latest_run.pid or None if self.latest_run is not None and not self.ended.is_set() else None

    @property
    def restarts(self) -> int:
        """How many times in a row it died without having served for a stable time."""
        return self._restarts.deaths

    async def ensure_ready(self) -> None:
        """Start the process unless it serves, sharing a start or a restart that is under way.

        Raises EngineStartError with the exit code and the last lines, or UnavailableError after a stop. A start goes
        on when a caller is cancelled.
        """
        while not self.ended.is_set() and (self.state is ProcessState.STOPPING or self._stop_wanted.done()):
            await self._moved.wait()
        if self._closed:
            raise UnavailableError(f"{self.name} was stopped")
        if self.state in _SERVING:
            return
        if self.ended.is_set():
            self.ended.clear()
            self._settled = asyncio.get_running_loop().create_future()
            self._stop_wanted = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._run(), name=f"engine process {self.name}")
        settled = self._settled
        await asyncio.wait({settled})
        if (error := settled.result()) is not None:
            raise error

    async def recovered(self) -> None:
        """Wait while it is being restarted; starts nothing. Returns at once in any other state."""
        while not self.ended.is_set() and not self._stop_wanted.done() and self.state not in _SERVING:
            await self._moved.wait()

    async def stop(self) -> None:
        """Ask it to stop, kill it after `stop_timeout`, and return when its whole tree has ended. Aborts a start."""
        task = self._task
        if task is None or task.done():
            return
        if not self._stop_wanted.done():
            self._stop_wanted.set_result(None)
        await asyncio.wait({task})

    async def close(self) -> None:
        """Stop for good: callers of `ensure_ready`, waiting ones too, get UnavailableError and no new process."""
        self._closed = True
        await self.stop()

    async def check(self) -> None:
        """Make a health check now, for the rpc HealthCheck; `state` follows from the latest checks, not from one.

        A process that must be restarted does not serve any longer when this returns.
        """
        run = self.latest_run
        if run is not None and run.health is not None:
            await self._check(run, run.health)
            if run.abandoned.done():
                await run.over.wait()

    # The states, from a start to the stop or the final failure

    async def _run(self) -> None:
        try:
            while True:
                self.failure = ""
                self._enter(ProcessState.STARTING)
                run = self.latest_run = ProcessRun(self.name, self._error_marks, self.on_output)
                try:
                    await self._run_once(run)
                except OSError as error:
                    run.failure = f"{self.name}: {files_in_use(error) if error.errno in NO_FILES else error}"
                except Exception as error:  # callers wait for the outcome, whatever it is
                    log.exception("%s: unexpected error", self.name)
                    run.failure = f"{self.name}: unexpected {type(error).__name__}: {error}"
                finally:
                    run.over.set()
                self.failure = run.failure
                if not run.failure or not await self._may_restart(run):
                    return
        finally:
            self._finish()

    async def _may_restart(self, run: ProcessRun) -> bool:
        """Wait for the back-off after a failure. False: no restart, after a first start that failed, one death too
        many, or a stop."""
        log.error("%s", run.failure)
        if run.served is None and not self._restarts.deaths:
            return False
        limit = self._limits.restart_limit
        pause = self._restarts.after_death(run.served or 0.0)
        if pause is None:
            if limit:
                self.failure += f" (it died {self.restarts} times in a row and is not restarted by itself again)"
            return False
        self._enter(ProcessState.RECOVERING)
        log.warning("%s: restarting in %g s (%d of %d)", self.name, pause, self.restarts, limit)
        await asyncio.wait({self._stop_wanted}, timeout=pause)
        return not self._stop_wanted.done()

    def _finish(self) -> None:
        if self._stop_wanted.done():
            self._restarts.forget()
        if self.state is ProcessState.RECOVERING:
            self.failure = ""  # a stop came before the restart
        if self.state is ProcessState.STARTING and not self.failure:
            self._enter(ProcessState.STOPPING)  # cancelled before there was a process
        self._enter(ProcessState.FAILED if self.failure else ProcessState.STOPPED)
        if not self._settled.done():
            stopped = UnavailableError(f"{self.name} was stopped while it was starting")
            self._settled.set_result(EngineStartError(self.failure) if self.failure else stopped)
        self.ended.set()

    def _enter(self, state: ProcessState) -> None:
        before = self.state
        if state is before:
            return
        if state not in MOVES[before]:
            raise RuntimeError(f"{self.name}: no way leads from {before.value} to {state.value}")
        log.debug("%s: %s -> %s", self.name, before.value, state.value)
        if state is ProcessState.DEGRADED:
            log.warning("%s does not answer: it is busy, or hangs", self.name)
        elif before is ProcessState.DEGRADED and state is ProcessState.READY:
            log.info("%s answers again", self.name)
        elif state is ProcessState.READY:
            self._settled.set_result(None)
        elif before in _SERVING:
            self._settled = asyncio.get_running_loop().create_future()  # callers now wait for the next start
        self.state = state
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    # One run: spawn, start, serve, end

    async def _run_once(self, run: ProcessRun) -> None:
        """Set `run.failure` unless the run ended because of a stop. Being cancelled ends the process, too."""
        command = self.command()
        try:
            env = {**command.env, TOKEN_VARIABLE: self._ticket.token}
            await run.spawn(command.argv, env, command.stdin)
        except OSError as error:
            reason = files_in_use(error) if error.errno in NO_FILES else error.strerror or error
            run.failure = f"{self.name}: cannot run {error.filename or command.argv[0]}: {reason}"
            return
        run.processor = ProcessorUse(run.pid)
        try:
            self._ticket.add(run.pid)
            run.failure = await self._start(run) or await self._serve(run)
        finally:
            self._enter(ProcessState.STOPPING)  # before the clean-up: a dead process must not pass for a ready one
            run.over.set()
            await self._end(run)

    async def _start(self, run: ProcessRun) -> str:
        """Probe until the process can serve. Returns why it failed; "" when it is ready or a stop came."""
        loop, limits = asyncio.get_running_loop(), self._limits
        progress_at = loop.time()
        latest_end = progress_at + limits.start_limit
        probing = asyncio.create_task(run.probe(self.can_serve))
        try:
            while True:
                progress_at = max(progress_at, run.progress_at)
                patience = max(0.0, min(progress_at + limits.start_timeout, latest_end) - loop.time())
                events: set[asyncio.Future[Any]] = {probing, self._stop_wanted, run.exited}
                await asyncio.wait(events, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if self._stop_wanted.done():
                    return ""
                if run.exited.done() or (probing.done() and probing.exception()):
                    return await self._failed_start(run, probing)
                if probing.done():
                    run.health = HealthRecord(limits.health_failures, limits.hung_timeout, loop.time())
                    self._enter(ProcessState.READY)
                    return ""
                if loop.time() >= latest_end:
                    return self._too_slow(run, f"not ready after {limits.start_limit:g} s", "start_limit")
                if run.progress_at <= progress_at:
                    if not await run.processor.grew(limits.start_timeout):
                        silence = f"no sign of progress for {limits.start_timeout:g} s"
                        return self._too_slow(run, silence, "start_timeout")
                    progress_at = loop.time()
        finally:
            probing.cancel()
            await asyncio.gather(probing, return_exceptions=True)

    async def _failed_start(self, run: ProcessRun, probing: asyncio.Task[None]) -> str:
        # A process that dies breaks its connections a moment before its exit is known.
        await asyncio.wait({run.exited}, timeout=process_run.DEATH_NOTICE)
        if run.exited.done():
            return f"{self.name} ended during its start: {await run.describe_exit(self._needs)}"
        error = probing.exception()
        why = str(error) or type(error).__name__
        return f"{self.name} cannot serve: {why}. Last lines: {run.last_lines() or 'none'}"

    def _too_slow(self, run: ProcessRun, what: str, option: str) -> str:
        return (
            f"{self.name}: {what} while starting. Last lines: {run.last_lines() or 'none'}. "
            f"Raise engine.{option} in plugin.yaml if this machine is slow"
        )

    async def _serve(self, run: ProcessRun) -> str:
        """Wait for a stop, or notice that the process has died or hangs. Returns why it failed, "" after a stop."""
        if run.health is None:
            return ""  # a stop came before it was ready
        loop = asyncio.get_running_loop()
        began = loop.time()
        watching = asyncio.create_task(self._watch(run, run.health))
        try:
            events: set[asyncio.Future[Any]] = {watching, self._stop_wanted, run.exited, run.abandoned}
            await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        finally:
            run.served = loop.time() - began
            run.health = None
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        if self._stop_wanted.done():
            return ""
        if run.exited.done():
            self._enter(ProcessState.STOPPING)
            return f"{self.name} died: {await run.describe_exit(self._needs)}"
        why = f"is restarted: {run.abandoned.result()}" if run.abandoned.done() else watching.result()
        return f"{self.name} {why}"

    async def _watch(self, run: ProcessRun, health: HealthRecord) -> str:
        """Make health checks. Returns only when the process must be restarted, with the reason."""
        loop, limits = asyncio.get_running_loop(), self._limits
        run.processor.forget()
        while True:
            began = loop.time()
            await asyncio.sleep(limits.health_interval)
            await self._check(run, health)
            answered = self.has_answered()
            if not health.silent:
                run.processor.forget()
                continue
            computed = await run.processor.grew(limits.health_interval)
            if answered or run.progress_at >= began or computed:
                health.sign_of_life = loop.time()
            elif computed is not None and health.hung(loop.time()):
                return (
                    f"hangs: no answer, output or use of the processor for {limits.hung_timeout:g} s. "
                    f"Last lines: {run.last_lines() or 'none'}"
                )

    async def _check(self, run: ProcessRun, health: HealthRecord) -> None:
        if why := self.unusable():
            if not run.abandoned.done():
                run.abandoned.set_result(why)
            return
        joins = self._checking.locked()
        async with self._checking:
            if joins:
                return  # the check that has just ended counts for both
            answered = await self.is_healthy()
            if run.health is not health:
                return  # it serves no more
            before = health.degraded
            health.note(answered=answered, now=asyncio.get_running_loop().time())
        if health.degraded is not before:
            self._enter(ProcessState.DEGRADED if health.degraded else ProcessState.READY)

    async def _end(self, run: ProcessRun) -> None:
        """Stop a process that still runs, kill its whole tree, and confirm that it has ended."""
        descendants: list[psutil.Process] = []
        try:
            if not run.exited.done():
                descendants = tree.descendants(
                    run.pid
                )  # found now: those in other sessions are lost once the parent ends
                run.close_stdin()
                if not self._stop_by_stdin:
                    tree.ask_to_stop(run.pid)
                await asyncio.wait({run.exited}, timeout=self._limits.stop_timeout)
            if not run.exited.done():
                log.warning("%s did not stop in %g s: killing it", self.name, self._limits.stop_timeout)
        finally:
            if not await run.kill(descendants, self._ticket.stragglers):
                log.error("%s (pid %d) could not be killed", self.name, run.pid)
            try:
                self._ticket.remove(run.pid)
            except OSError as error:
                log.warning("%s has ended, but: %s", self.name, error)
