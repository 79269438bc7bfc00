"""The runner's side of one worker process: frames in both directions, running calls, and the end of the process.

A frame is a tuple whose first item is its kind. Any other output on stdout ends the worker.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.process import memory
from engine_plugin.process.child import STDERR, STDOUT, ChildProcess
from engine_plugin.process.lines import Lines
from engine_plugin.waiting import comes_true
from openvino_server.errors import RequestError
from openvino_server.frames import encode
from openvino_server.sinks import OneResult
from openvino_server.unpacking import FrameReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvino_server.sinks import Sink

__all__ = ["BadModelError", "LoadError", "Worker"]

_TAIL_LINES = 8
_TAIL_LINE = 500
_LINE = 16 * 1024
_GATHER = 0.004
"""Seconds between two writes to the clients of a worker's streams. A step of a fast model takes less."""
_DRAINED_WITHIN = 0.5
_KILLED_WITHIN = 2.0
_CANNOT_BE_KILLED = "it was killed but has not exited"


class LoadError(Exception):
    """A worker failed to load its model. The message is the reason."""


class BadModelError(LoadError):
    """The model's files cannot be loaded, so that another attempt would fail too."""


class Worker(ChildProcess):
    """One worker process, from its spawn to its end, for a model of `size` bytes. Its model spawns and stops it."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        self.name = name
        self._size = size
        self._kills = memory.kills()
        self.over = asyncio.Event()
        """Set when it has ended and its calls have failed."""
        self.ended_because = ""
        self.heard = False
        """Whether it has written anything since this was set to False."""
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._loaded.add_done_callback(lambda loaded: loaded.cancelled() or loaded.exception())  # may have no waiter
        self._calls: dict[int, Sink | None] = {}  # by number, until the worker ends them; None: cancelled
        self._last_number = 0
        self._frames = FrameReader()
        self._stderr = Lines(_LINE)
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._stopping = False
        self._dirty: dict[Sink, None] = {}
        self._flushed = 0.0
        self._flush_timer: asyncio.TimerHandle | None = None

    # For the model and its calls

    async def load(self, settings: dict[str, Any], within: float) -> dict[str, Any]:
        """Load the model; return the facts that the worker reports. After a LoadError the worker must be stopped."""
        self._send(("load", settings))
        done, _ = await asyncio.wait({self._loaded}, timeout=within)
        if not done:
            raise LoadError(f"not loaded in {within:g} s")
        return self._loaded.result()

    def submit(self, request: dict[str, Any], sink: Sink) -> int:
        """Begin a call; return its number. Raises RequestError when the process has ended."""
        if self.over.is_set() or self._stopping:
            raise RequestError(f"model {self.name} is being unloaded; try again", 503)
        self._last_number += 1
        self._send(("do", self._last_number, request))
        self._calls[self._last_number] = sink
        return self._last_number

    def cancel(self, number: int) -> None:
        """Cancel a call, unless it has ended."""
        sink = self._calls.get(number)
        if sink is not None:
            self._calls[number] = None  # the worker is busy until it confirms the end of the call
            self._dirty.pop(sink, None)
            self._send(("cancel", number))

    async def ask(
        self, request: dict[str, Any], on_part: Callable[[list[Any]], None] | None = None
    ) -> dict[str, Any]:
        """Make a whole call; return its `done` payload. A cancel cancels the call. Raises RequestError."""
        sink = OneResult(on_part)
        number = self.submit(request, sink)
        try:
            return await sink.result
        finally:
            self.cancel(number)

    @property
    def loading(self) -> bool:
        """Whether its model is still being loaded."""
        return not self._loaded.done()

    @property
    def owes(self) -> bool:
        """Whether it loads, or has calls to answer."""
        return self.loading or bool(self._calls)

    @property
    def abandoned(self) -> bool:
        """Whether a cancelled call has not ended yet."""
        return any(sink is None for sink in self._calls.values())

    def rss(self) -> int:
        """Bytes of memory that the process has in use; 0 when it has ended."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return 0

    async def stop(self, within: float) -> None:
        """End the process: an idle one has `within` seconds to quit, any other is killed. Running calls fail."""
        self._stopping = True
        try:
            if not self.over.is_set() and not self.owes:
                self._send(("quit",))
                self.stdin.close()
                await comes_true(self.over.wait(), within)
        finally:
            self.kill_now()
        await asyncio.wait({self.exited}, timeout=_KILLED_WITHIN)
        if not self.exited.done():
            self._end(_CANNOT_BE_KILLED)
        await self.kill()

    def give_up(self, reason: str) -> None:
        """Kill the process. Its calls fail with `reason`."""
        self.ended_because = self.ended_because or reason
        self.kill_now()
        self._loop.call_later(_KILLED_WITHIN, self._end, _CANNOT_BE_KILLED)

    # Called by asyncio (SubprocessProtocol)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.heard = True
        if fd == STDERR:
            self._hear_stderr(self._stderr.feed(data))
            return
        if self.ended_because:
            return
        try:
            for frame in self._frames.feed(data):
                self._take(frame)
        except (ValueError, TypeError, LookupError) as error:
            self._frames.clear()
            self.give_up(f"invalid output: {error}")
        if self._dirty and self._flush_timer is None:
            wait = self._flushed + _GATHER - self._loop.time()
            if wait <= 0:
                self._flush()
            else:
                self._flush_timer = self._loop.call_later(wait, self._flush)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        super().pipe_connection_lost(fd, exc)
        if fd == STDOUT and not self._stopping:  # no more results can arrive
            self._loop.call_later(_DRAINED_WITHIN, self.kill_now)

    def process_exited(self) -> None:
        super().process_exited()
        # Another process may hold the pipes open.
        self._loop.call_later(_DRAINED_WITHIN, self._end)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end()

    # Frames

    def _send(self, frame: tuple[Any, ...]) -> None:
        if not self.stdin.is_closing():
            self.stdin.write(encode(frame))

    def _take(self, frame: tuple[Any, ...]) -> None:
        """Handle a frame. Raises ValueError, TypeError or LookupError for an unknown kind or shape."""
        match frame:
            case ("part", parts):
                for number, payload in parts:
                    if sink := self._sink(number):
                        sink.part(payload)
            case ("done", number, payload):
                if sink := self._sink(number, last=True):
                    sink.done(payload)
            case ("error", number, status, kind, message):
                if sink := self._sink(number, last=True):
                    sink.failed(RequestError(self._with_shortage(message, None), status, kind))
            case ("ready", facts) if self.loading:
                self._loaded.set_result(dict(facts))
            case ("failed", text, short) if self.loading:
                reason = self._with_shortage(str(text), None)
                # C++'s bad_alloc may arrive as another exception, with its text only.
                self._loaded.set_exception(LoadError(reason) if short or reason != text else BadModelError(reason))
            case _:
                raise ValueError(f"not a frame: {frame[0]!r}")

    def _sink(self, number: int, *, last: bool = False) -> Sink | None:
        """The receiver of a frame for this call, to be flushed; None if the call was cancelled. `last`: it ends."""
        sink = self._calls.pop(number, None) if last else self._calls.get(number)
        if sink is not None:
            self._dirty[sink] = None
        return sink

    def _flush(self) -> None:
        self._flush_timer = None
        self._flushed = self._loop.time()
        dirty, self._dirty = self._dirty, {}
        for sink in dirty:
            sink.flush()

    # The end

    def _hear_stderr(self, lines: list[str]) -> None:
        for text in filter(None, lines):
            self._tail.append(text[:_TAIL_LINE])
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def _with_shortage(self, text: str, code: int | None) -> str:
        """`text`, followed by the memory figures if it or the exit status `code` points to a lack of memory."""
        lack = memory.shortage(code, text, self._kills, self._size)
        return f"{text.rstrip(': .')}. {lack}" if lack else text

    def _end(self, reason: str = "") -> None:
        if self.over.is_set():
            return
        self._hear_stderr(self._stderr.end())
        code = self._transport.get_returncode()
        known = self.ended_because or reason
        text = "; ".join([known or _status(code), *self._tail])
        self.ended_because = self._with_shortage(text, None if known else code)
        self.over.set()
        if not self._loaded.done():
            self._loaded.set_exception(LoadError(f"its process ended: {self.ended_because}"))
        if self._stopping:
            error = RequestError(f"model {self.name} was unloaded", 503)
        else:
            error = RequestError(f"the process of model {self.name} ended: {self.ended_because}", 500, "server_error")
        calls, self._calls = self._calls, {}
        for sink in calls.values():
            if sink is not None:
                sink.failed(error)
                self._dirty[sink] = None
        self._flush()


def _status(code: int | None) -> str:
    if code is None:
        return "gone"
    if code >= 0:
        return f"exit status {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
