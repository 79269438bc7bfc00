"""One subprocess: its pipes, its exit, and the end of its whole tree.

Built on asyncio's callbacks, because asyncio's own Process reports the exit only after every pipe is closed, and a
grandchild may hold the pipes for ever.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engine_plugin.process import guard, tree
from engine_plugin.system.files import in_thread
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import psutil

__all__ = ["STDERR", "STDOUT", "ChildProcess", "PipedProcess"]

STDIN, STDOUT, STDERR = 0, 1, 2
_KILL_CONFIRM = 5.0
_KILL_PAUSE = 0.01
# Programs load files from their working directory, as llama.cpp does its back ends; others may write to the plugin's.
_NEUTRAL = Path(sys.executable).anchor


@dataclass(eq=False, repr=False)
class ChildProcess(asyncio.SubprocessProtocol):
    """A process that `spawn` starts. Its owner awaits `kill` in the end, even if the process has exited."""

    take: Callable[[int, bytes], None] = field(default=lambda _stream, _data: None, kw_only=True)
    """It gets (STDOUT or STDERR, bytes) as they come. A subclass may override `pipe_data_received` instead."""

    pid: int = field(default=0, init=False)
    exited: asyncio.Future[int] = field(default_factory=asyncio.Future, init=False)
    """The exit status; negative for a signal."""

    drained: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    """Set when all output of the process has been passed on."""

    stdin: asyncio.WriteTransport = field(init=False)
    _transport: asyncio.SubprocessTransport = field(init=False)
    _job: Any = field(default=None, init=False)  # on Windows, ends the process with the plugin
    _open: set[int] = field(default_factory=lambda: {STDOUT, STDERR}, init=False)
    _closed: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def spawn(self, argv: Sequence[str], env: Mapping[str, str], stdin: bytes = b"") -> None:
        """Run `argv` with `env` in the root directory. Raises OSError.

        `stdin` is written; then stdin stays open until `close_stdin`.
        """
        await asyncio.get_running_loop().subprocess_exec(
            lambda: self,
            *argv,
            env={**env, guard.PARENT_VARIABLE: str(os.getpid())},
            cwd=_NEUTRAL,
            **tree.SPAWN_OPTIONS,
        )
        if sys.platform == "win32":
            try:
                self._job = tree.bind_to_us(self.pid)
            except OSError:
                await self.kill()
                raise
        if stdin:
            self.stdin.write(stdin)

    def close_stdin(self) -> None:
        """Close stdin after what was written."""
        self.stdin.close()

    async def kill(
        self, known: Sequence[psutil.Process] = (), stragglers: Callable[[], list[psutil.Process]] | None = None
    ) -> bool:
        """Kill all that is left of the tree, `known` members included, and close the pipes.

        `stragglers` runs last, in a thread, and finds descendants that have left the tree. False when a process
        survived the kill for seconds, as one in an uninterruptible system call does.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + _KILL_CONFIRM
        try:
            gone = await self._kill_all(known, give_up)
            # Closing before the exit is known would have asyncio kill the process by its number once more.
            await asyncio.wait({self.exited}, timeout=max(_KILL_PAUSE, give_up - loop.time()))
            while gone and stragglers is not None and (found := await in_thread(stragglers)):
                gone = await self._kill_all(found, give_up)
        finally:
            if self.stdin.get_write_buffer_size():
                self.stdin.abort()  # else closing waits for a reader
            self._transport.close()
            if self._job is not None:
                self._job.close()
        if not self.exited.done():
            return False
        await comes_true(self._closed.wait(), within=_KILL_CONFIRM)
        return gone

    def kill_now(self) -> None:
        """Kill the process without waiting for its exit."""
        with suppress(ProcessLookupError):
            self._transport.kill()

    async def _kill_all(self, victims: Sequence[psutil.Process], give_up: float) -> bool:
        """Kill until none is left; False at the time `give_up`."""
        loop = asyncio.get_running_loop()
        while victims := tree.kill_tree(self.pid, victims, leader_gone=self.exited.done()):
            if loop.time() > give_up:
                return False
            await asyncio.sleep(_KILL_PAUSE)
        return True

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)
        self.stdin = cast("asyncio.WriteTransport", self._transport.get_pipe_transport(STDIN))
        self.pid = self._transport.get_pid()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.take(fd, data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self._open.discard(fd)
        if not self._open:
            self.drained.set()

    def process_exited(self) -> None:
        code = self._transport.get_returncode()
        if code is not None and not self.exited.done():
            self.exited.set_result(code)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self._closed.set()


@dataclass(eq=False, repr=False)
class PipedProcess(ChildProcess):
    """A process whose stdout is read from `output`; while nothing reads it, the pipe fills."""

    output: asyncio.StreamReader = field(default_factory=asyncio.StreamReader, init=False)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.output.set_transport(cast("asyncio.Transport", self._transport.get_pipe_transport(STDOUT)))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == STDOUT:
            self.output.feed_data(data)
        else:
            self.take(fd, data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        super().pipe_connection_lost(fd, exc)
        if fd == STDOUT:
            self.output.feed_eof()
