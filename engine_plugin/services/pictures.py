"""Pictures: the formats and sizes that a request may ask for, and the number and sizes of those in a request.

No picture is decoded: sizes are read from the first bytes. A picture in an unknown format is left to the engine.
"""

from __future__ import annotations

import binascii
import re
import struct
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError
from engine_plugin.system.data_urls import base64_start

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "IMAGE_FORMATS",
    "MOST_PICTURES",
    "MOST_PIXELS",
    "check_pictures",
    "listed",
    "picture_size",
    "pictures_of",
    "size_of",
]

IMAGE_FORMATS = ("png", "jpeg", "webp")
"""The values of text-to-image's `output_format`; the first is the default."""

MOST_PICTURES = 16
MOST_PIXELS = 64_000_000
"""For all pictures of a request together."""

_SIZE = re.compile(r"([0-9]{1,6})[xX*]([0-9]{1,6})")
_LOOKED_AT = 700_000
"""Characters of base64 that are searched for a picture's size: a camera's metadata before it is shorter."""


def picture_size(size: str) -> tuple[int, int]:
    """Width and height in pixels, of `512x512` or `512*512`. Raises InvalidRequestError, naming the field."""
    found = _SIZE.fullmatch(size)
    if found is None:
        raise InvalidRequestError.at(
            "size", f'must be a width and a height in pixels, such as "512x512", not {size[:60]!r}'
        )
    return int(found[1]), int(found[2])


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
    try:
        width, height = _header_size(data)
    except struct.error:  # truncated
        return 0, 0
    return width, height


def _header_size(data: bytes) -> tuple[int, ...]:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return struct.unpack_from(">II", data, 16)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return struct.unpack_from("<HH", data, 6)
    if data.startswith(b"BM"):
        return tuple(map(abs, struct.unpack_from("<ii", data, 18)))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    return _jpeg(data) if data.startswith(b"\xff\xd8") else (0, 0)


def _webp(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _jpeg(data: bytes) -> tuple[int, int]:
    """From the header of the first frame; segments before it are skipped."""
    place = 2
    while True:
        start, mark, length, height, width = struct.unpack_from(">BBHxHH", data, place)
        if start != 0xFF:
            return 0, 0
        if mark in _FRAMES:
            return width, height
        place += 1 if mark == 0xFF else 2 + max(2, length)
