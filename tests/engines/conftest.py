"""Real processes and sockets, of which nothing is left after a test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from engine_plugin.process.process import Command, EngineProcess, ProcessSpec
from engine_plugin.process.records import TOKEN_VARIABLE
from engine_plugin.process.restarts import RestartPolicy
from tests.patience import LIMIT, pace, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

CHILD = [sys.executable, "-I", "-S", str(Path(__file__).with_name("child.py"))]
ROOT = Path(__file__).parents[2]


def alive(pid: int) -> bool:
    """Whether the process runs (one that only waits to be reaped does not)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def descriptors() -> int:
    """How many files this process has open."""
    if sys.platform == "win32":
        return psutil.Process().num_handles()
    return psutil.Process().num_fds()


class Stage:
    """Spawns children of one test, which carry its token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = secrets.token_hex(16)
        self.env = {**os.environ, TOKEN_VARIABLE: self.token}
        self.processes: list[EngineProcess] = []

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def pid(self, name: str) -> int:
        """The pid that a child wrote to a file."""
        return int((self.folder / name).read_text())

    def spec(self, *actions: str, **changes: Any) -> ProcessSpec:
        """A child that is ready when it has created the file `ready`, which is removed at its end. `changes` are
        fields of ProcessSpec or of Command."""
        ready = self.folder / "ready"

        async def is_ready() -> bool:
            return ready.exists()

        def forget(_pid: int) -> None:
            ready.unlink(missing_ok=True)

        run: dict[str, Any] = {"argv": [*CHILD, *actions], "env": self.env}
        run |= {key: changes.pop(key) for key in ("argv", "stdin", "cwd") if key in changes}
        given: dict[str, Any] = {"name": "child", "command": lambda: Command(**run), "ready": is_ready}
        given |= {"on_end": forget, "start_timeout": LIMIT, "start_limit": 2 * LIMIT, "stop_timeout": pace(5.0)}
        given |= {"restart": RestartPolicy(limit=0)}
        return ProcessSpec(**(given | changes))

    def engine(self, *actions: str, **changes: Any) -> EngineProcess:
        process = EngineProcess(self.spec(*actions, **changes))
        self.processes.append(process)
        return process

    def left(self) -> list[psutil.Process]:
        """Every process of this test that lives."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get(TOKEN_VARIABLE) == self.token
                if mine and process.pid != os.getpid() and alive(process.pid):
                    found.append(process)
        return found


@contextlib.contextmanager
def running(stage: Stage, argv: list[str], **env: str) -> Iterator[subprocess.Popen[str]]:
    """A process of the test with pipes."""
    pipe = subprocess.PIPE
    environ = {**stage.env, "PYTHONPATH": str(ROOT), **env}
    with subprocess.Popen(argv, env=environ, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room for a unix socket's name."""
    path = Path(tempfile.mkdtemp(prefix="epe-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture
async def stage(short_dir: Path) -> AsyncIterator[Stage]:
    """Children; stopped after the test, which must have left none behind."""
    stage = Stage(short_dir)
    try:
        yield stage
        async with asyncio.timeout(LIMIT):
            for process in stage.processes:
                await process.stop()
        assert stage.left() == []
    finally:
        for left in stage.left():
            left.kill()
        await until(lambda: stage.left() == [], "killed")
