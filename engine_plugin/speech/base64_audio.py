"""Audio in a JSON request: base64, plain or in a data: URL."""

from __future__ import annotations

import asyncio
import binascii

from engine_plugin.errors import InvalidRequestError
from engine_plugin.system.data_urls import base64_start

__all__ = ["decode_base64_audio"]

_BLOCK = 1 << 20  # characters: decoding them blocks other threads for a millisecond
_SMALL = 256 * 1024
_SPACE = b" \t\r\n"


async def decode_base64_audio(text: str) -> bytes:
    """Decode the field `audio`, in a thread if it is large. Raises InvalidRequestError with the field's name."""
    if len(text) <= _SMALL:
        return _decode(text)
    return await asyncio.to_thread(_decode, text)


def _decode(text: str) -> bytes:
    """Decode in blocks, so that a large request does not hold the interpreter lock for long."""
    out, rest = bytearray(), b""
    try:
        for place in range(base64_start(text), len(text), _BLOCK):
            block = rest + text[place : place + _BLOCK].encode("ascii").translate(None, _SPACE)
            # Keep the last four characters back: only the end of the text may have padding.
            whole = max(0, len(block) - 1 - (len(block) - 1) % 4)
            if block[:whole].endswith(b"="):
                raise ValueError("data after the padding")
            out += binascii.a2b_base64(block[:whole], strict_mode=True)
            rest = block[whole:]
        out += binascii.a2b_base64(rest + b"=" * (-len(rest) % 4), strict_mode=True)
    except ValueError as error:
        raise InvalidRequestError.at("audio", f"is not valid base64: {_cause(error)}") from None
    if not out:
        raise InvalidRequestError.at("audio", "is empty")
    return bytes(out)


def _cause(error: ValueError) -> str:
    return "it contains non-ASCII characters" if isinstance(error, UnicodeError) else str(error)
