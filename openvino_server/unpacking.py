"""Frames from a worker, which is not trusted: a library in it may write to the same pipe.

A frame is its length (four bytes, big-endian) and a pickle of a tuple. Only plain values are unpickled.
"""

from __future__ import annotations

import io
import pickle
import struct
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FrameReader", "decode"]

_LENGTH = struct.Struct(">I")
_FRAME_LIMIT = 1 << 30


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles numbers, strings, bytes and containers, but neither classes nor functions."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} in a frame")


def decode(data: bytes | bytearray) -> tuple[Any, ...]:
    """Unpickle a frame without its length. Raises ValueError for anything else."""
    try:
        frame = _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # noqa: BLE001  # pickle raises nearly anything for noise
        raise ValueError(f"not a frame: {error}") from None
    if not isinstance(frame, tuple) or not frame:
        raise ValueError("not a frame: not a tuple")
    return frame


class FrameReader:
    """Assembles frames from the pieces of a pipe's output."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Any, ...]]:
        """Yield the frames that this piece completes; iterate to the end. Raises ValueError for other output."""
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            if length > _FRAME_LIMIT:
                raise ValueError(f"not a frame: {length} bytes")
            begin, end = at + _LENGTH.size, at + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            yield decode(self._buffer[begin:end])
            at = end
        del self._buffer[:at]

    def clear(self) -> None:
        """Drop the buffer, because after invalid output the beginning of the next frame is unknown."""
        self._buffer = bytearray()
