"""A client's frames, judged where the HTTP/2 core is laxer or harsher than RFC 9113.

The core ignores DATA and HEADERS of closed streams (section 5.1 demands an error) and faulty PRIORITY frames (6.3),
and closes the connection when one stream's window overflows (6.9.1: the stream is reset).
"""

from __future__ import annotations

import ngh2
from ngh2 import ErrorCode

__all__ = ["ClientFrames"]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADER = 9  # bytes of a frame's header
_JUDGED = 13  # bytes of a frame that decide: its header, and four of its payload
_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _WINDOW_UPDATE = 0, 1, 2, 3, 8
_OF_STREAMS = frozenset({_DATA, _HEADERS, _PRIORITY, _RST_STREAM})
_WITH_PAYLOAD = frozenset({_PRIORITY, _WINDOW_UPDATE})
_END_STREAM = 1
_LARGEST = (1 << 31) - 1
# Streams that the server ended and the client did not. Frames for older ones cannot be under way any more.
_MOST_KEPT = 10_000


class ClientFrames:
    """Follows the frames of one connection. Used by its server for all bytes that the client sends."""

    __slots__ = ("_core", "_latest", "_open", "_partial", "_skip")

    def __init__(self, core: ngh2.Connection) -> None:
        self._core = core
        self._skip = len(_PREFACE)  # bytes until the next frame's header
        self._partial = b""
        self._latest = 0
        self._open: dict[int, None] = {}  # streams on which the client may still send

    def admit(self, data: bytes) -> tuple[bytes, ErrorCode | None]:
        """Take bytes, which may begin and end anywhere.

        Returns the bytes for the core, and the error that the connection must end with after them, if any. The
        header of a frame is held back until it is complete. Raises what the core raises.
        """
        if self._partial:
            data, self._partial = self._partial + data, b""
        position = self._skip
        while position < len(data):
            head = data[position : position + _JUDGED]
            length = int.from_bytes(head[:3], "big")
            if len(head) < _needed(head, length):
                self._skip = 0
                self._partial = data[position:]
                return data[:position], None
            if head[3] == _WINDOW_UPDATE:
                self._core.receive_data(data[:position])  # earlier frames change the window
                data, position = data[position:], 0
                if self._overflows(head):
                    data = data[_HEADER + length :]
                    continue
            elif head[3] in _OF_STREAMS and (error := self._error(head)) is not None:
                return data[:position], error
            position += _HEADER + length
        self._skip = position - len(data)
        return data, None

    def _overflows(self, head: bytes) -> bool:
        """Whether a WINDOW_UPDATE raises a stream's window above the limit; then the stream is reset."""
        number, increment = _number(head), int.from_bytes(head[9:13], "big") & _LARGEST
        try:
            if not number or self._core.stream_remote_window_size(number) + increment <= _LARGEST:
                return False
        except ngh2.StreamUnavailableError:
            return False
        self._core.reset_stream(number, ErrorCode.FLOW_CONTROL_ERROR)
        return True

    def _error(self, head: bytes) -> ErrorCode | None:
        kind, number = head[3], _number(head)
        if kind == _PRIORITY:
            depends_on = int.from_bytes(head[9:13], "big") & _LARGEST
            return ErrorCode.PROTOCOL_ERROR if number in (0, depends_on) else None
        if kind == _RST_STREAM:
            self._open.pop(number, None)
        elif number > self._latest:
            if kind == _HEADERS:  # DATA of an idle stream is the core's to judge
                self._begin(number, ended=bool(head[4] & _END_STREAM))
        elif number not in self._open:
            return ErrorCode.STREAM_CLOSED
        elif head[4] & _END_STREAM:
            del self._open[number]
        return None

    def _begin(self, number: int, *, ended: bool) -> None:
        self._latest = number
        if not ended:
            self._open[number] = None
            if len(self._open) > _MOST_KEPT:
                del self._open[next(iter(self._open))]


def _needed(head: bytes, length: int) -> int:
    """How many bytes of a frame must be there to judge it."""
    if len(head) >= _HEADER and head[3] in _WITH_PAYLOAD:
        return _HEADER + min(length, _JUDGED - _HEADER)
    return _HEADER


def _number(head: bytes) -> int:
    return int.from_bytes(head[5:9], "big") & _LARGEST
