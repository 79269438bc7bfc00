"""The plugin's standard output while a host holds it: nothing but the handshake line may reach the real one.

Whatever else is printed goes into a pipe, from there into a bounded buffer, and to the host by GRPCStdio. The
host stops reading the real stdout once a line exceeds 64 KiB, which would block the writer for ever; and it
waits for the end of stdout and stderr when the plugin has gone, so no child may hold them.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import sys
import threading

__all__ = ["CHUNK", "OutputBuffer", "StandardOutput"]

CHUNK = 1024  # bytes; what go-plugin's own server sends
_LIMIT = 1 << 20  # bytes kept for a host that does not read


class OutputBuffer:
    """Bytes on their way from threads to a reader on an event loop. When full, the oldest are dropped."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        self._data = bytearray()
        self._lock = threading.Lock()
        self._closed = False
        self._readers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self.dropped = 0  # bytes

    def put(self, data: bytes) -> None:
        """Add to the end; never waits. Any thread."""
        with self._lock:
            self._data += data
            excess = max(0, len(self._data) - self._limit)
            del self._data[:excess]
            self.dropped += excess
            self._wake()

    def close(self) -> None:
        """No more will come; the reader ends after what is left. Any thread."""
        with self._lock:
            self._closed = True
            self._wake()

    async def get(self) -> bytes:
        """The next 1 to 1,024 bytes, waiting for them; empty once closed and read to the end."""
        while True:
            with self._lock:
                chunk = bytes(self._data[:CHUNK])
                del self._data[:CHUNK]
                if chunk or self._closed:
                    return chunk
                event = asyncio.Event()
                self._readers.append((asyncio.get_running_loop(), event))
            await event.wait()

    def _wake(self) -> None:
        readers, self._readers = self._readers, []
        for loop, event in readers:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the reader
                loop.call_soon_threadsafe(event.set)


class StandardOutput:
    """Holds the real stdout for the handshake line; fd 1 leads into `buffer`. Made by `serve` before all else."""

    def __init__(self) -> None:
        self.buffer = OutputBuffer()
        self._real: int | None = os.dup(1)  # not inheritable, as all descriptors that Python makes
        source, sink = os.pipe()
        # Children may inherit this pipe: its other end goes with us, so the host never waits for them.
        os.dup2(sink, 1)
        os.close(sink)
        os.set_inheritable(2, False)
        threading.Thread(target=self._pump, args=(source,), name="stdout", daemon=True).start()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)

    def announce(self, line: bytes) -> None:
        """Write the handshake line to the real stdout and let go of it. Raises OSError when the host is gone."""
        if self._real is None:
            raise OSError("the handshake line was already written")
        real, self._real = self._real, None
        try:
            while line:
                line = line[os.write(real, line) :]
        finally:
            os.close(real)

    def close(self) -> None:
        """Send fd 1 nowhere, so that nothing printed while the process ends can block it.

        The buffer ends when all that was printed is in it, unless a child still holds the pipe. A real stdout
        that was never announced on stays open: at its end the host kills, and our error would be lost.
        """
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)

    def _pump(self, source: int) -> None:
        # A thread: a print by the event loop itself must be taken while that loop stands.
        with open(source, "rb", buffering=0) as pipe:
            while data := pipe.read(1 << 16):
                self.buffer.put(data)
        self.buffer.close()
