"""Sound in a JSON request: base64, alone or in a data: URL."""

from __future__ import annotations

import asyncio
import binascii

from engine_plugin.errors import InvalidRequestError

__all__ = ["sound_of"]

_BLOCK = 1 << 20  # characters: decoding them keeps other threads waiting for a millisecond
_SMALL = 256 * 1024
_SPACE = b" \t\r\n"


async def sound_of(text: str) -> bytes:
    """The bytes; big ones are decoded in a thread. Raises InvalidRequestError, naming the field `audio`."""
    if len(text) <= _SMALL:
        return _decode(text)
    return await asyncio.to_thread(_decode, text)


def _decode(text: str) -> bytes:
    """Decode block by block, so that a big request never holds the interpreter for long."""
    start = 0
    if text.startswith("data:"):
        start = text.find(",") + 1
        if not text[:start].endswith(";base64,"):
            raise InvalidRequestError.at("audio", "is a data: URL without base64; write data:audio/wav;base64,…")
    out, rest = bytearray(), b""
    try:
        for place in range(start, len(text), _BLOCK):
            block = rest + text[place : place + _BLOCK].encode("ascii").translate(None, _SPACE)
            # The last four characters wait: only the very last ones may have padding.
            whole = max(0, len(block) - 1 - (len(block) - 1) % 4)
            if block[:whole].endswith(b"="):
                raise ValueError("something follows its end")
            out += binascii.a2b_base64(block[:whole], strict_mode=True)
            rest = block[whole:]
        out += binascii.a2b_base64(rest + b"=" * (-len(rest) % 4), strict_mode=True)
    except ValueError as error:
        raise InvalidRequestError.at("audio", f"is not base64 of a sound file ({_cause(error)})") from None
    if not out:
        raise InvalidRequestError.at("audio", "is empty")
    return bytes(out)


def _cause(error: ValueError) -> str:
    return "it has other than ASCII characters" if isinstance(error, UnicodeError) else str(error)
