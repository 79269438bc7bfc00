"""The worker's ends of its two pipes: one for requests, one for answers.

A frame is its length (four bytes, big-endian) and a pickle of a tuple. Unpickling requests is safe: only the server
process writes to the pipe, and only plain values.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import sys
import threading
from typing import Any, TypeAlias

from engine_plugin.process import guard
from engine_plugin.process.entry import own_stdin, read_exactly

__all__ = ["Channel", "Frame", "Inbox", "encode", "incoming", "own_pipes", "receive"]

Frame = tuple[Any, ...]
Inbox: TypeAlias = "queue.SimpleQueue[Frame]"

_LENGTH = struct.Struct(">I")
_ROOM = 1 << 20  # bytes of a pipe: the model must not wait for a server process that is briefly busy
_F_SETPIPE_SZ = 1031


def own_pipes() -> tuple[int, Channel]:
    """Prepare this process, which ends with its parent: the pipe of requests, and that of answers.

    What libraries write to stdout goes to stderr.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the plugin
    guard.arm()
    channel = Channel(os.dup(1))
    os.dup2(2, 1)
    return own_stdin(), channel


def encode(frame: Frame) -> bytes:
    """The bytes of a frame on the pipe."""
    body = pickle.dumps(frame, protocol=5)
    return _LENGTH.pack(len(body)) + body


def receive(descriptor: int) -> Frame:
    """Read the next frame; blocks. Raises EOFError or OSError at the end of the pipe."""
    (length,) = _LENGTH.unpack(read_exactly(descriptor, _LENGTH.size))
    frame: Frame = pickle.loads(read_exactly(descriptor, length))  # noqa: S301  # from the server process
    return frame


class Channel:
    """The pipe for answers. If the server process has ended, a write ends this process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        _widen(descriptor)

    def send(self, *frames: Frame) -> None:
        """Write frames in one piece. Thread-safe; blocks while the pipe is full."""
        data = memoryview(b"".join(map(encode, frames)))
        with self._lock:
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                os._exit(0)


def incoming(descriptor: int) -> Inbox:
    """The queue of the requests from a pipe, filled by a thread. The end of the pipe ends this process at once."""
    frames: Inbox = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                frames.put(receive(descriptor))
        except (OSError, EOFError):
            pass
        finally:
            os._exit(0)

    threading.Thread(target=read, name="inbox", daemon=True).start()
    return frames


def _widen(descriptor: int) -> None:
    if sys.platform == "linux":
        import fcntl

        try:
            fcntl.fcntl(descriptor, _F_SETPIPE_SZ, _ROOM)
        except OSError:  # no pipe, or the system's limit for its user is reached
            return
