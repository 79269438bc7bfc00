"""Pictures in a request: their number and sizes, read from their first bytes, for every engine.

No picture is decoded here. A picture in an unknown format is left to the engine.
"""

from __future__ import annotations

import binascii
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError
from engine_plugin.system.data_urls import base64_start

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["MOST_PICTURES", "MOST_PIXELS", "check_pictures", "listed", "pictures_of", "size_of"]

MOST_PICTURES = 16
MOST_PIXELS = 64_000_000
"""For all pictures of a request together."""

_LOOKED_AT = 700_000
"""Characters of base64 that are searched for a picture's size: a camera's metadata before it is shorter."""


def check_pictures(pictures: Iterable[tuple[str, str]]) -> None:
    """Raise InvalidRequestError for too many or too large pictures, given as paths with data: URLs or base64."""
    pixels = 0
    for number, (place, source) in enumerate(pictures, 1):
        if number > MOST_PICTURES:
            raise InvalidRequestError.at(place, f"is one picture too many; a request may have {MOST_PICTURES}")
        width, height = size_of(_beginning(source))
        pixels += width * height
        if pixels > MOST_PIXELS:
            raise InvalidRequestError.at(
                place,
                f"has {width} x {height} pixels; all pictures of a request may have "
                f"{MOST_PIXELS // 1_000_000} million together. Send smaller ones",
            )


def pictures_of(messages: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """The pictures in a chat's messages, in OpenAI's or Ollama's form, each with its field's path."""
    for index, message in enumerate(messages):
        content, images = message.get("content"), message.get("images")
        for part_index, part in enumerate(content if isinstance(content, list) else ()):
            picture = part.get("image_url") if isinstance(part, dict) else None
            url = picture.get("url") if isinstance(picture, dict) else picture
            if isinstance(url, str):
                yield f"messages[{index}].content[{part_index}].image_url", url
        yield from listed(images, f"messages[{index}].images")


def listed(images: Any, place: str) -> Iterator[tuple[str, str]]:
    """The pictures of a list, each with its field's path."""
    for index, image in enumerate(images if isinstance(images, list) else ()):
        if isinstance(image, str):
            yield f"{place}[{index}]", image


def _beginning(source: str) -> bytes:
    """The first bytes of a picture; empty for invalid base64, which the engine rejects."""
    try:
        start = base64_start(source)
        text = source[start : start + _LOOKED_AT]
        return binascii.a2b_base64(text[: len(text) - len(text) % 4])
    except ValueError:
        return b""


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height in pixels from the header of a PNG, JPEG, GIF, WebP or BMP; (0, 0) for anything else."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _big(data, 16, 4), _big(data, 20, 4)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _little(data, 6, 2), _little(data, 8, 2)
    if data.startswith(b"BM"):
        return _signed(data, 18), _signed(data, 22)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    return _jpeg(data) if data.startswith(b"\xff\xd8") else (0, 0)


def _webp(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return _little(data, 24, 3) + 1, _little(data, 27, 3) + 1
    if kind == b"VP8L":
        bits = _little(data, 21, 4)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return _little(data, 26, 2) & 0x3FFF, _little(data, 28, 2) & 0x3FFF


_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _jpeg(data: bytes) -> tuple[int, int]:
    """From the header of the first frame; segments before it are skipped."""
    place = 2
    while place + 9 <= len(data):
        if data[place] != 0xFF:
            return 0, 0
        mark = data[place + 1]
        if mark in _FRAMES:
            return _big(data, place + 7, 2), _big(data, place + 5, 2)
        place += 1 if mark == 0xFF else 2 + max(2, _big(data, place + 2, 2))
    return 0, 0


def _big(data: bytes, place: int, size: int) -> int:
    return int.from_bytes(data[place : place + size], "big")


def _little(data: bytes, place: int, size: int) -> int:
    return int.from_bytes(data[place : place + size], "little")


def _signed(data: bytes, place: int) -> int:
    return abs(int.from_bytes(data[place : place + 4], "little", signed=True))
