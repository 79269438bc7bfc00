"""Real processes and sockets, of which nothing is left after a test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from engine_plugin.process.engine_process import Command, EngineProcess, ProcessLimits
from engine_plugin.process.records import TOKEN_VARIABLE, ProcessTicket
from tests.patience import LIMIT, pace, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

CHILD = [sys.executable, "-I", "-S", str(Path(__file__).with_name("child.py"))]
ROOT = Path(__file__).parents[2]


def alive(pid: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def descriptors() -> int:
    """Return how many files this process has open."""
    if sys.platform == "win32":
        return psutil.Process().num_handles()
    return psutil.Process().num_fds()


class Spawner:
    """Spawns children that carry the token of their test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = secrets.token_hex(16)
        self.env = {**os.environ, TOKEN_VARIABLE: self.token}
        self.processes: list[EngineProcess] = []

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def pid(self, name: str) -> int:
        """Return the pid that a child wrote to a file."""
        return int((self.folder / name).read_text())

    def engine(self, *actions: str, **changes: Any) -> EngineProcess:
        """Return a child that is ready when it has created the file `ready`, removed at its end. `changes` are
        fields of Command or of ProcessLimits, arguments of EngineProcess, or functions that replace its steps."""
        ready = self.folder / "ready"

        async def is_ready() -> bool:
            return ready.exists()

        def forget(_pid: int) -> None:
            ready.unlink(missing_ok=True)

        def some(*names: str) -> dict[str, Any]:
            return {name: changes.pop(name) for name in names if name in changes}

        command = Command(**({"argv": [*CHILD, *actions], "env": self.env} | some("argv", "stdin")))
        limits: dict[str, Any] = {"start_timeout": LIMIT, "start_limit": 2 * LIMIT, "stop_timeout": pace(5.0)}
        limits |= {"restart_limit": 0}
        limits |= some(*(field.name for field in fields(ProcessLimits)))
        steps = {"ready": is_ready, "on_end": forget}
        steps |= some("ready", "healthy", "on_output", "on_spawn", "on_end", "stragglers")
        process = ScriptedProcess(command, ScriptedTicket(self, steps), ProcessLimits(**limits), steps, **changes)
        self.processes.append(process)
        return process

    def left(self) -> list[psutil.Process]:
        """Return every running process of this test."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get(TOKEN_VARIABLE) == self.token
                if mine and process.pid != os.getpid() and alive(process.pid):
                    found.append(process)
        return found


class ScriptedTicket(ProcessTicket):
    """A ticket that calls functions of the test instead of writing records."""

    def __init__(self, spawner: Spawner, steps: dict[str, Any]) -> None:
        super().__init__(spawner.folder)
        self.token = spawner.token
        self._steps = steps

    def add(self, pid: int) -> None:
        self._steps.get("on_spawn", int)(pid)

    def remove(self, pid: int) -> None:
        self._steps["on_end"](pid)

    def stragglers(self) -> list[psutil.Process]:
        found: list[psutil.Process] = self._steps.get("stragglers", list)()
        return found


class ScriptedProcess(EngineProcess):
    """A process whose steps are functions of the test."""

    def __init__(
        self, command: Command, ticket: ProcessTicket, limits: ProcessLimits, steps: dict[str, Any], **arguments: Any
    ) -> None:
        super().__init__("child", ticket, limits, **arguments)
        self._command = command
        self._steps = steps

    def command(self) -> Command:
        return self._command

    async def can_serve(self) -> bool:
        ready: bool = await self._steps["ready"]()
        return ready

    async def is_healthy(self) -> bool:
        healthy: bool = await self._steps["healthy"]() if "healthy" in self._steps else True
        return healthy

    def on_output(self, line: str) -> None:
        self._steps.get("on_output", str)(line)


@contextlib.contextmanager
def running(spawner: Spawner, argv: list[str], **env: str) -> Iterator[subprocess.Popen[str]]:
    """Run a process with pipes for the test."""
    pipe = subprocess.PIPE
    environ = {**spawner.env, "PYTHONPATH": str(ROOT), **env}
    with subprocess.Popen(argv, env=environ, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
async def spawner(short_dir: Path) -> AsyncIterator[Spawner]:
    """Yield a Spawner; stop its children after the test and check that none is left."""
    spawner = Spawner(short_dir)
    try:
        yield spawner
        async with asyncio.timeout(LIMIT):
            for process in spawner.processes:
                await process.stop()
        assert spawner.left() == []
    finally:
        for left in spawner.left():
            left.kill()
        await until(lambda: spawner.left() == [], "killed")
