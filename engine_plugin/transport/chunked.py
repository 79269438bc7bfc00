"""The chunked encoding of HTTP/1.1 (RFC 9112, section 7.1), undone for many chunks at a time."""

from __future__ import annotations

from functools import lru_cache
from itertools import takewhile

from engine_plugin.errors import BadGatewayError

__all__ = ["ChunkedBody"]

_FEW = 1024
"""Bytes that are decoded faster chunk by chunk."""
_LONGEST_LINE = 1024
_USUAL_LINE = 16
"""Bytes of the longest line whose size is looked up; a longer one may be content, which the cache must not keep."""
_LONGEST_TRAILER = 64 * 1024
_HEX = b"0123456789abcdefABCDEF"


class ChunkedBody:
    """Decodes one body. `ended` is set at its end, its trailer included."""

    __slots__ = ("_left", "_open", "ended")

    def __init__(self) -> None:
        self.ended = False
        self._left = 0  # bytes of the current chunk yet to arrive
        self._open = False  # the current chunk's closing CRLF is yet to arrive

    def take(self, data: bytes) -> tuple[bytes, int]:
        """Decode all chunks, and part of one, at the start of `data`.

        Returns the content, and how many bytes were taken; the caller passes the others again, followed by more.
        Raises BadGatewayError for an encoding that is not valid.
        """
        pieces: list[bytes] = []
        position = self._rest_of_chunk(data, 0, pieces)
        if not self._open and len(data) - position > _FEW:
            position += _whole_chunks(data[position:], pieces)
        while not self._open and (line_end := _line_end(data, position)) >= 0:
            size = _size(data[position:line_end])
            if size < 0:
                raise _broken()
            if size == 0:
                after = _after_trailer(data, line_end + 2)
                if after >= 0:
                    self.ended, position = True, after
                break
            self._left, self._open = size, True
            position = self._rest_of_chunk(data, line_end + 2, pieces)
        return b"".join(pieces), position

    def _rest_of_chunk(self, data: bytes, position: int, pieces: list[bytes]) -> int:
        """Take what belongs to the current chunk from `position` on. Returns the position after it."""
        if piece := data[position : position + self._left]:
            pieces.append(piece)
            position += len(piece)
            self._left -= len(piece)
        if self._open and not self._left and len(data) - position >= 2:
            if not data.startswith(b"\r\n", position):
                raise _broken()
            self._open = False
            position += 2
        return position


def _whole_chunks(data: bytes, pieces: list[bytes]) -> int:
    """Take the whole chunks at the start of `data`, up to one that contains CRLF; the bytes that they took."""
    lines = data.split(b"\r\n")
    chunks = lines[1:-1:2]
    heads = lines[: 2 * len(chunks) : 2]
    if heads and max(map(len, heads)) > _USUAL_LINE:
        heads = list(takewhile(_is_usual, heads))
        del chunks[len(heads) :]
    sizes = list(map(len, chunks))
    announced = list(map(_size, heads))
    if sizes != announced or 0 in sizes:
        wrong = (n for n, size in enumerate(sizes) if size != announced[n] or not size)
        del chunks[next(wrong) :]
    pieces += chunks
    rest = lines[2 * len(chunks) :]
    return len(data) - sum(map(len, rest)) - 2 * (len(rest) - 1)


def _is_usual(head: bytes) -> bool:
    return len(head) <= _USUAL_LINE


@lru_cache(maxsize=4096)
def _size(line: bytes) -> int:
    """The size in the first line of a chunk; -1 if the line is not valid."""
    digits = line if line.isalnum() else line.partition(b";")[0].strip()
    if not digits or len(digits) > 8 or digits.translate(None, _HEX):
        return -1
    return int(digits, 16)


def _line_end(data: bytes, start: int) -> int:
    """The end of the line that begins at `start`; -1 while it has not arrived."""
    end = data.find(b"\r\n", start)
    if (end if end >= 0 else len(data)) - start > _LONGEST_LINE:
        raise _broken()
    return end


def _after_trailer(data: bytes, start: int) -> int:
    """The end of the body, given the start of its trailer; -1 while it has not arrived."""
    if data.startswith(b"\r\n", start):
        return start + 2
    end = data.find(b"\r\n\r\n", start)
    if end < 0 and len(data) - start > _LONGEST_TRAILER:
        raise BadGatewayError("the engine's answer has a trailer that does not end")
    return end + 4 if end >= 0 else -1


def _broken() -> BadGatewayError:
    return BadGatewayError("the engine's chunked encoding is broken")
