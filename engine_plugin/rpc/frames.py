"""A client's frames, judged where the HTTP/2 core is laxer or harsher than RFC 9113.

The core ignores DATA and HEADERS of closed streams (section 5.1 demands an error) and faulty PRIORITY frames (6.3),
and closes the connection when one stream's window overflows (6.9.1: the stream is reset).
"""

from __future__ import annotations

import ngh2
from ngh2 import ErrorCode

from engine_plugin.rpc.authority import without_at

__all__ = ["ClientFrames"]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADER = 9  # bytes of a frame's header
_JUDGED = 13  # bytes of a frame that decide: its header, and four of its payload
_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _WINDOW_UPDATE = 0, 1, 2, 3, 8
_OF_STREAMS = frozenset({_DATA, _HEADERS, _PRIORITY, _RST_STREAM})
_WITH_PAYLOAD = frozenset({_PRIORITY, _WINDOW_UPDATE})
_END_STREAM = 1
_LARGEST = (1 << 31) - 1
_INCREMENT = 4  # bytes of a WINDOW_UPDATE's payload
_LONGEST_FRAME = 16 << 10  # bytes of payload; the core ends the connection for a longer one
# The latest streams that the server ended and the client did not. For older ones no frame can be under way any more.
_KEPT = 10_000


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

        Returns the bytes for the core, and the error that the connection must end with after them, if any. A frame is
        held back until enough of it is there to judge it. Raises what the core raises.
        """
        if self._partial:
            data, self._partial = self._partial + data, b""
        given, position = 0, self._skip
        while position < len(data):
            head = data[position : position + _JUDGED]
            length = int.from_bytes(head[:3], "big")
            if len(data) - position < _needed(head, length):
                self._skip = 0
                self._partial = data[position:]
                return data[given:position], None
            kind, end = head[3], position + _HEADER + length
            if kind == _WINDOW_UPDATE:
                self._core.receive_data(data[given:position])  # earlier frames change the window
                given = end if length == _INCREMENT and self._overflows(head) else position
            elif kind in _OF_STREAMS and (error := self._error(head)) is not None:
                return data[given:position], error
            elif kind == _HEADERS and b"@" in (frame := data[position:end]):
                data = data[:position] + without_at(frame) + data[end:]
            position = end
        self._skip = position - len(data)
        return data[given:], None

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
            if len(self._open) > 3 * _KEPT:
                self._forget()

    def _forget(self) -> None:
        """Forget streams that the server ended and the client did not, but for the latest."""
        numbers = list(self._open)
        known = [number for number in numbers[:-_KEPT] if self._knows(number)]
        self._open = dict.fromkeys([*known, *numbers[-_KEPT:]])

    def _knows(self, number: int) -> bool:
        try:
            self._core.stream_remote_window_size(number)
        except ngh2.StreamUnavailableError:
            return False
        return True


def _needed(head: bytes, length: int) -> int:
    """How many bytes of a frame must be there to judge it."""
    if len(head) < _HEADER:
        return _HEADER
    if head[3] == _HEADERS:
        return _HEADER + (length if length <= _LONGEST_FRAME else 0)
    return _HEADER + (min(length, _INCREMENT) if head[3] in _WITH_PAYLOAD else 0)


def _number(head: bytes) -> int:
    return int.from_bytes(head[5:9], "big") & _LARGEST
