"""The `:authority` that grpcio sends for a socket whose path has an "@".

grpcio sends the path, with "@" as it is, which the HTTP/2 core refuses (RFC 9113, 8.3.1: no userinfo). grpcio writes
the header as a literal without Huffman coding (RFC 7541, 6.2), so another character of the same length can take the
place of "@" before the core decodes the block; nothing reads the `:authority` of a call.
"""

from __future__ import annotations

__all__ = ["without_at"]

_PADDED, _PRIORITY = 0x08, 0x20
_HEADER = 9  # bytes of a frame's header
_AUTHORITY, _NAME = 1, b":authority"  # in HPACK's static table; grpcio writes the name


def without_at(frame: bytes) -> bytes:
    """A whole HEADERS frame with "_" for each "@" of a plain `:authority`. A malformed one is the core's to judge."""
    block = bytearray(frame)
    padded, priority = frame[4] & _PADDED, frame[4] & _PRIORITY
    position = _HEADER + (1 if padded else 0) + (5 if priority else 0)
    try:
        while position < len(block):
            position = _next_field(block, position)
    except IndexError:
        pass
    return bytes(block)


def _next_field(block: bytearray, position: int) -> int:
    """Go over one field, and rewrite it if it is an `:authority`. Raises IndexError where the block ends in it."""
    first = block[position]
    if first & 0x80:  # a field of the table
        return _integer(block, position, 7)[1]
    if first & 0x60 == 0x20:  # the table's new size
        return _integer(block, position, 5)[1]
    index, position = _integer(block, position, 6 if first & 0x40 else 4)
    name = _NAME if index == _AUTHORITY else b""
    if not index:
        begin, position, plain = _string(block, position)
        name = bytes(block[begin:position]) if plain else b""
    begin, end, plain = _string(block, position)
    if name == _NAME and plain:
        block[begin:end] = block[begin:end].replace(b"@", b"_")
    return end


def _string(block: bytearray, position: int) -> tuple[int, int, bool]:
    """Where a string begins and ends, and whether it is without Huffman coding."""
    plain = block[position] < 0x80
    length, begin = _integer(block, position, 7)
    return begin, begin + length, plain


def _integer(block: bytearray, position: int, bits: int) -> tuple[int, int]:
    """An integer with a prefix of so many bits (RFC 7541, 5.1), and the position after it."""
    most = (1 << bits) - 1
    value = block[position] & most
    position += 1
    if value < most:
        return value, position
    shift = 0
    while True:
        byte = block[position]
        value += (byte & 0x7F) << shift
        position += 1
        shift += 7
        if byte < 0x80:
            return value, position
