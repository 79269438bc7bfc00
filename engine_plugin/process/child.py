"""One subprocess: its pipes, its exit, and the end of its whole tree.

Built on asyncio's callbacks, because asyncio's own Process reports the exit only after every pipe is closed, and a
grandchild may hold the pipes for ever.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engine_plugin.process import guard, tree
from engine_plugin.system.files import in_thread
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import psutil

__all__ = ["STDERR", "STDOUT", "ChildProcess"]

STDIN, STDOUT, STDERR = 0, 1, 2
_KILL_CONFIRM = 5.0
_KILL_PAUSE = 0.01
# Programs load files from their working directory, as llama.cpp does its back ends; others may write to the plugin's.
_NEUTRAL = Path(sys.executable).anchor


class ChildProcess(asyncio.SubprocessProtocol):
    """A spawned process. Its owner awaits `kill` in the end, even if the process has exited."""

    def __init__(self, take: Callable[[int, bytes], None]) -> None:
        """Use `spawn`."""
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """The exit status; negative for a signal."""
        self.drained = asyncio.Event()
        """Set when all output of the process has been passed on."""
        self.pid = 0
        self._take = take
        self._job: Any = None  # on Windows, ends the process with the plugin
        self._open = {STDOUT, STDERR}
        self._closed = asyncio.Event()
        self._transport: asyncio.SubprocessTransport  # from `connection_made` on

    @classmethod
    async def spawn(
        cls,
        argv: Sequence[str],
        env: Mapping[str, str],
        take: Callable[[int, bytes], None],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
    ) -> ChildProcess:
        """Run `argv` with `env`; `take` gets (STDOUT or STDERR, bytes) as they come. Raises OSError.

        `stdin` is written; then stdin stays open until `close_stdin`. Without `cwd` it runs in the root directory.
        """
        pipe = asyncio.subprocess.PIPE
        _, child = await asyncio.get_running_loop().subprocess_exec(
            lambda: cls(take),
            *argv,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env={**env, guard.PARENT_VARIABLE: str(os.getpid())},
            cwd=cwd or _NEUTRAL,
            **tree.spawn_options(held=True),
        )
        if sys.platform == "win32":
            try:
                child._job = tree.bind_to_us(child.pid)
            except OSError:
                await child.kill()
                raise
        if stdin:
            child._stdin().write(stdin)
        return child

    def close_stdin(self) -> None:
        """Close stdin after what was written."""
        self._stdin().close()

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
            if self._stdin().get_write_buffer_size():
                self._stdin().abort()  # else closing waits for a reader
            self._transport.close()
            if self._job is not None:
                self._job.close()
        if not self.exited.done():
            return False
        await comes_true(self._closed.wait(), within=_KILL_CONFIRM)
        return gone

    async def _kill_all(self, victims: Sequence[psutil.Process], give_up: float) -> bool:
        """Kill until none is left; False at the time `give_up`."""
        loop = asyncio.get_running_loop()
        while victims := tree.kill_tree(self.pid, victims, leader_gone=self.exited.done()):
            if loop.time() > give_up:
                return False
            await asyncio.sleep(_KILL_PAUSE)
        return True

    def _stdin(self) -> asyncio.WriteTransport:
        return cast("asyncio.WriteTransport", self._transport.get_pipe_transport(STDIN))

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)
        self.pid = self._transport.get_pid()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._take(fd, data)

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
