"""text-to-image: pictures from a description, OpenAI's image generations."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services.base import RequestValidator, choice, integer, number, optional, words

__all__ = ["IMAGE_FORMATS", "TextToImage", "picture_size"]

IMAGE_FORMATS = ("png", "jpeg", "webp")
"""The values of `output_format`; the first is the default."""

_MAX_SIDE = 16384
_MAX_IMAGES = 10
_MAX_STEPS = 1000
_MAX_SEED = 2**64 - 1
_SIZE = re.compile(r"([0-9]{1,6})[xX*]([0-9]{1,6})")


class TextToImage(RequestValidator):
    """`prompt` in, `data` with a `b64_json` for each picture out; streamed, events of the steps before it."""

    name: ClassVar[str] = "text-to-image"

    def read(self, data: bytes) -> dict[str, Any]:
        request = super().read(data)
        for field, default in (("seed", -1), ("rng_seed", -1), ("size", "auto")):
            if request.get(field) == default:  # the same as leaving it out
                del request[field]
        return request

    def check(self, request: dict[str, Any]) -> None:
        words(request, "prompt")
        optional(request, "negative_prompt", str)
        size = optional(request, "size", str)
        if size not in (None, "auto") and not all(1 <= side <= _MAX_SIDE for side in picture_size(size)):
            raise InvalidRequestError.at("size", f"width and height must be from 1 to {_MAX_SIDE} pixels, not {size}")
        integer(request, "n", 1, _MAX_IMAGES)
        integer(request, "num_inference_steps", 1, _MAX_STEPS)
        for field in ("seed", "rng_seed"):
            integer(request, field, -1, _MAX_SEED)
        number(request, "guidance_scale", 0, 1000)
        choice(request, "response_format", ("b64_json",))
        choice(request, "output_format", IMAGE_FORMATS)


def picture_size(size: str) -> tuple[int, int]:
    """Width and height in pixels, of `512x512` or `512*512`. Raises InvalidRequestError, naming the field."""
    found = _SIZE.fullmatch(size)
    if found is None:
        raise InvalidRequestError.at(
            "size", f'must be a width and a height in pixels, such as "512x512", not {size[:60]!r}'
        )
    return int(found[1]), int(found[2])
