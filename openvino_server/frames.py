"""The worker's ends of its two pipes: requests come on one, answers leave on the other.

A frame is a length of four bytes, big end first, and that many bytes of a pickled tuple. The server process is
the only one at the other end. It writes plain values only, so that no pickle here comes from a request.
"""

from __future__ import annotations

import os
import pickle
import queue
import struct
import sys
import threading
from typing import Any

from engine_plugin.process.entry import read_exactly

__all__ = ["Channel", "Frame", "Inbox", "encode", "receive"]

Frame = tuple[Any, ...]

_LENGTH = struct.Struct(">I")
_ROOM = 1 << 20  # bytes in a pipe: a server process that is busy for a moment must not stop the model
_F_SETPIPE_SZ = 1031


def encode(frame: Frame) -> bytes:
    """A frame as it goes over the pipe."""
    body = pickle.dumps(frame, protocol=5)
    return _LENGTH.pack(len(body)) + body


def receive(descriptor: int) -> Frame:
    """The next frame, waited for. Raises EOFError, OSError at the end of the pipe."""
    (length,) = _LENGTH.unpack(read_exactly(descriptor, _LENGTH.size))
    frame: Frame = pickle.loads(read_exactly(descriptor, length))  # noqa: S301  # from the server process
    return frame


class Channel:
    """Sends answers. Blocks while the pipe is full; ends this process when the server process has ended."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        _widen(descriptor)

    def send(self, *frames: Frame) -> None:
        """Write some frames together. Any thread may."""
        data = memoryview(b"".join(map(encode, frames)))
        with self._lock:
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                os._exit(0)


class Inbox:
    """The requests that have come, read by a thread. The end of the pipe ends the process at once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self.empty = self._frames.empty
        """Whether `get` would wait."""
        self.get = self._frames.get
        """The next frame, when there is one."""
        self.put = self._frames.put
        """Queue a frame from this process."""

    def start(self) -> None:
        """Read from now on."""
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                self.put(receive(self._descriptor))
        except (OSError, EOFError):
            pass
        finally:
            os._exit(0)


def _widen(descriptor: int) -> None:
    if sys.platform == "linux":
        import fcntl

        try:
            fcntl.fcntl(descriptor, _F_SETPIPE_SZ, _ROOM)
        except OSError:  # no pipe, or the system's limit for its user is reached
            return
