"""A plugin's process: spawns it, drains its output, reads its handshake line and ends it.

It uses asyncio's subprocess transport directly: `process_exited` is called even while a grandchild holds the pipes
open.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engine_plugin.errors import PluginProcessError
from engine_plugin.host.handshake import parse_handshake
from engine_plugin.host.logs import LineSplitter, PluginLog
from engine_plugin.system.programs import program_doubt
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engine_plugin.host.handshake import Handshake
    from engine_plugin.host.logs import LogLine

__all__ = ["PluginProcess"]

_STDOUT, _STDERR = 1, 2
# Seconds to wait for output after the exit, because a grandchild can hold the pipe open.
_LAST_OUTPUT = 0.5
# Seconds; a killed process is reaped at once unless it is in an uninterruptible wait.
_REAPED = 5.0
_SHOWN_LINES = 10

_log = logging.getLogger(__name__)


class PluginProcess(asyncio.SubprocessProtocol):
    """The process of a plugin. Created by `spawn`; the caller of `spawn` must call `end`."""

    def __init__(self, name: str, on_log: Callable[[LogLine], None] | None) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self._log = PluginLog(name, on_log)
        self._lines = {_STDOUT: LineSplitter(), _STDERR: LineSplitter()}
        self._first_line: asyncio.Future[str] = loop.create_future()
        self._exited = asyncio.Event()
        self._drained = asyncio.Event()
        self._transport: asyncio.SubprocessTransport

    @classmethod
    async def spawn(
        cls,
        name: str,
        command: Sequence[str],
        *,
        cwd: Path | None,
        env: Mapping[str, str],
        on_log: Callable[[LogLine], None] | None,
    ) -> PluginProcess:
        """Start `command` with an empty stdin. Raises PluginProcessError if it cannot be run."""
        loop = asyncio.get_running_loop()
        try:
            _, protocol = await loop.subprocess_exec(
                lambda: cls(name, on_log), *command, stdin=asyncio.subprocess.DEVNULL, cwd=cwd, env=dict(env)
            )
        except OSError as error:
            raise PluginProcessError(_cannot_run(name, command, cwd, error)) from error
        return protocol

    @property
    def pid(self) -> int:
        """The process id."""
        return self._transport.get_pid()

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal, None while the process runs."""
        return self._transport.get_returncode()

    def log_output(self, line: str) -> None:
        """Log a line of the plugin's output, from its pipes or from go-plugin's stdio stream."""
        try:
            self._log.add(line)
        except Exception:  # noqa: BLE001 - a caller's on_log must not stop the draining of the pipe
            _log.exception("on_log failed for a line of plugin %r", self.name)

    async def handshake(self, auto_mtls: bool = False) -> Handshake:
        """Wait for the handshake line, without a bound. Raises PluginProcessError for an invalid line or an exit."""
        gone = asyncio.ensure_future(self._gone())
        waited: set[asyncio.Future[Any]] = {gone, self._first_line}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not self._first_line.done():
            raise PluginProcessError(self.describe("before its handshake"))
        try:
            return parse_handshake(self._first_line.result(), auto_mtls)
        except PluginProcessError as error:
            raise PluginProcessError(f"plugin {self.name!r}: {error}{self._last_lines()}") from None

    async def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the exit and the last output. Return whether the process has exited."""
        if not await comes_true(self._exited.wait(), within=timeout):
            return False
        await self._gone()
        return True

    async def end(self, grace: float) -> None:
        """Wait `grace` seconds for the exit, then kill and reap the process. Idempotent."""
        try:
            if not await self.wait(grace):
                if grace > 0:
                    self.log_output(f"[WARN] plugin {self.name!r} did not exit within {grace:g} s; killing it")
                self._transport.kill()
                await self.wait(_REAPED)
        finally:
            self._transport.close()  # kills the process after a cancellation
        if self._exited.is_set():
            await self._gone()

    async def _gone(self) -> None:
        """Wait for the exit, and briefly for the last output."""
        await self._exited.wait()
        # A child of the plugin can hold the pipe open, so this wait has a bound.
        await comes_true(self._drained.wait(), within=_LAST_OUTPUT)

    def describe(self, when: str) -> str:
        """Return the state of the process with its last lines, for a PluginProcessError."""
        code = self.returncode
        if code is None:
            state = "was still running"
        elif code < 0:
            state = f"was killed by signal {-code}"
        else:
            state = f"exited with code {code}"
        return f"plugin {self.name!r} {state} {when}{self._last_lines()}"

    def _last_lines(self) -> str:
        lines = self._log.tail()[-_SHOWN_LINES:]
        return "; its last lines: " + " | ".join(lines) if lines else ""

    # Called by asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        for line in self._lines[fd].feed(data):
            self._line(fd, line)

    def pipe_connection_lost(self, fd: int, _exc: Exception | None) -> None:
        if fd in self._lines:
            for line in self._lines[fd].close():
                self._line(fd, line)

    def process_exited(self) -> None:
        self._exited.set()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._drained.set()

    def _line(self, fd: int, line: str) -> None:
        if fd == _STDOUT and not self._first_line.done():
            self._first_line.set_result(line)
        else:
            self.log_output(line)


def _cannot_run(name: str, command: Sequence[str], cwd: Path | None, error: OSError) -> str:
    program = Path(command[0])
    if program.is_file() and (doubt := program_doubt(program)):
        return f"plugin {name!r} cannot be run: {doubt}."
    advice = {
        FileNotFoundError: "Check the executable's path in plugin.yaml's platforms and the working directory",
        PermissionError: "Make it executable (chmod +x)",
    }.get(type(error), "Check that it is built for this platform")
    where = f"{command[0]} (in {cwd or 'this directory'})"
    return f"plugin {name!r} cannot be run: {error.strerror or error}: {where}. {advice}."
