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
    """Knows no class and no function: numbers, strings, bytes and containers only."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} in a frame")


def decode(data: bytes) -> tuple[Any, ...]:
    """Unpickle a frame without its length. Raises ValueError for anything else."""
    try:
        frame = _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # noqa: BLE001  # pickle raises nearly anything for noise
        raise ValueError(f"not a frame: {error}") from None
    if not isinstance(frame, tuple) or not frame:
        raise ValueError("not a frame: no tuple")
    return frame


class FrameReader:
    """Joins the pieces that arrive into frames."""

    def __init__(self) -> None:
        self._heard = bytearray()
        self._need = _LENGTH.size

    def feed(self, data: bytes) -> Iterator[tuple[Any, ...]]:
        """The frames that this piece completes; iterate to the end. Raises ValueError for anything but frames."""
        heard = self._heard
        heard += data
        if len(heard) < self._need:
            return
        at = 0
        with memoryview(heard) as view:
            while True:
                self._need = _LENGTH.size
                if len(heard) - at < self._need:
                    break
                (length,) = _LENGTH.unpack_from(heard, at)
                if length > _FRAME_LIMIT:
                    raise ValueError(f"not a frame: {length} bytes")
                self._need += length
                if len(heard) - at < self._need:
                    break
                yield decode(bytes(view[at + _LENGTH.size : at + self._need]))
                at += self._need
        del heard[:at]

    def clear(self) -> None:
        """Forget what has come: there is no telling where the next frame would begin."""
        self._heard = bytearray()
