"""The plugin's standard output under a host: only the handshake line may reach the real one.

Other output goes through a pipe into a bounded buffer, and to the host by GRPCStdio. The host stops reading the
real stdout once a line exceeds 64 KiB, which would block the writer for ever; and after the plugin's exit it waits
for the end of stdout and stderr, so no child may hold them.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import io
import os
import select
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

if sys.platform == "linux":
    import fcntl

__all__ = ["OutputBuffer", "StandardOutput"]

_CHUNK = 1024  # bytes; the chunk size of go-plugin's server
_LIMIT = 1 << 20  # bytes kept for a host that does not read


class OutputBuffer:
    """Bytes from threads for a reader on an event loop. When full, the oldest are dropped."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        self._data = bytearray()
        self._lock = threading.Lock()
        self._closed = False
        self._readers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self.dropped = 0  # bytes

    def put(self, data: bytes) -> None:
        """Append without waiting. Called from any thread."""
        with self._lock:
            self._data += data
            excess = max(0, len(self._data) - self._limit)
            del self._data[:excess]
            self.dropped += excess
            self._wake()

    def close(self) -> None:
        """Mark the end; the reader still gets what is buffered. Called from any thread."""
        with self._lock:
            self._closed = True
            self._wake()

    async def get(self) -> bytes:
        """Wait for and return the next 1 to 1,024 bytes; empty after the end."""
        while True:
            with self._lock:
                chunk = bytes(self._data[:_CHUNK])
                del self._data[:_CHUNK]
                if chunk or self._closed:
                    return chunk
                event = asyncio.Event()
                self._readers.append((asyncio.get_running_loop(), event))
            await event.wait()

    def _wake(self) -> None:
        readers, self._readers = self._readers, []
        for loop, event in readers:
            with contextlib.suppress(RuntimeError):  # the loop, and the reader with it, has ended
                loop.call_soon_threadsafe(event.set)


class StandardOutput:
    """Keeps the real stdout for the handshake line; fd 1 leads into `buffer`.

    Created first of all, by `serve`, in the main thread.
    """

    def __init__(self, source: int | None = None) -> None:
        """`source` is the pipe into which fd 1 leads already, if the line is printed."""
        self.buffer = OutputBuffer()
        if source is None:
            self._real = os.dup(1)  # not inheritable, as all descriptors that Python creates
            source, sink = os.pipe()
            # Children may inherit this pipe: its other end closes with this process, so no host waits for them.
            os.dup2(sink, 1)
            os.close(sink)
        self._source = source
        self._settled = False
        """Whether the thread that reads the pipe has begun, or there is nothing to read any more."""
        os.set_inheritable(2, False)
        self._await_output()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)

    def announce(self, line: bytes) -> None:
        """Write the handshake line to the real stdout and close it. Raises OSError when the host has died.

        Called once, by `session`.
        """
        try:
            while line:
                line = line[os.write(self._real, line) :]
        finally:
            os.close(self._real)

    def close(self) -> None:
        """Redirect fd 1 to the null device, so that output during the exit cannot block it.

        The buffer ends with the last output, unless a child still holds the pipe. Without a handshake line the real
        stdout stays open: at its end the host kills the plugin, and the logged error would be lost.
        """
        if not self._settled:
            self._settled = True
            self._signal_output(False)
            self.buffer.close()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)

    # A thread reads the pipe, because output of the event loop's own thread must be read while it is blocked. Most
    # plugins print nothing: on Linux the thread begins with the first output, which interrupts even a blocked write.

    @contextlib.contextmanager
    def waking_loop(self) -> Iterator[None]:
        """Inside the block, let the first output wake the running event loop. Used by `session`.

        A signal that comes just before the loop begins to wait, or to another thread, does not end that wait.
        """
        from engine_plugin.waiting import handle_signal

        if sys.platform != "linux":
            yield
            return
        handle_signal(signal.SIGIO, self._on_output)
        self._start_if_printed()
        try:
            yield
        finally:
            if not self._settled:  # without a handler the signal ends the process
                self._signal_output(False)
            asyncio.get_running_loop().remove_signal_handler(signal.SIGIO)
            self._await_output()

    def _await_output(self) -> None:
        if sys.platform == "linux":
            signal.signal(signal.SIGIO, self._on_output)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO])  # as the host may have left it
            if not self._settled:
                fcntl.fcntl(self._source, fcntl.F_SETOWN, os.getpid())
                self._signal_output(True)
                self._start_if_printed()
        else:
            self._start_pump()

    def _signal_output(self, wanted: bool) -> None:
        if sys.platform == "linux":
            fcntl.fcntl(self._source, fcntl.F_SETFL, os.O_ASYNC if wanted else 0)

    def _on_output(self, *_signal: object) -> None:
        self._start_pump()

    def _start_if_printed(self) -> None:
        if not self._settled and select.select([self._source], [], [], 0)[0]:
            self._start_pump()

    def _start_pump(self) -> None:
        if self._settled:
            return
        self._settled = True  # first: another signal may interrupt this
        try:
            _thread.start_new_thread(self._pump, ())  # `threading` has locks, which a signal's handler must not take
        except RuntimeError:  # the system refuses a thread; the next output tries again
            self._settled = False
        else:
            self._signal_output(False)

    def _pump(self) -> None:
        with io.FileIO(self._source) as pipe:
            while data := pipe.read(1 << 16):
                self.buffer.put(data)
        self.buffer.close()
