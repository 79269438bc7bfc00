"""Pictures in messages, for models with vision."""

from __future__ import annotations

import base64
import io
import struct
from typing import TYPE_CHECKING, Any

from engine_plugin.services.pictures import MOST_PICTURES, MOST_PIXELS
from engine_plugin.system.data_urls import base64_start
from openvino_server.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["pictures"]

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What Pillow may open; others of its formats start programs, such as Ghostscript for EPS."""


def pictures(sources: Sequence[str]) -> list[Any]:
    """Tensors (1, height, width, 3) of pictures given as data: URLs or bare base64. Raises RequestError."""
    if len(sources) > MOST_PICTURES:
        raise RequestError(f"image_url[{MOST_PICTURES}]: is one picture too many; a request may have {MOST_PICTURES}")
    found: list[Any] = []
    left = MOST_PIXELS
    for index, source in enumerate(sources):
        found.append(_picture(source, f"image_url[{index}]", left))
        left -= found[-1].shape[1] * found[-1].shape[2]
    return found


def _picture(source: str, field: str, most_pixels: int) -> Any:
    import numpy as np
    import openvino
    from PIL import Image

    if source.startswith(("http://", "https://", "file:")):
        raise RequestError(f"{field}: send the picture itself as a data: URL; addresses are not followed")
    try:
        data = source[base64_start(source) :]
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=_FORMATS) as image:
            if image.width * image.height > most_pixels:
                raise RequestError(
                    f"{field}: has {image.width} x {image.height} pixels; all pictures of a request may have "
                    f"{MOST_PIXELS // 1_000_000} million together"
                )
            pixels = np.asarray(image.convert("RGB"), dtype=np.uint8)
    except (ValueError, SyntaxError, OSError, struct.error, Image.DecompressionBombError) as error:
        raise RequestError(f"{field}: not a picture in base64 ({', '.join(_FORMATS)}): {error}") from error
    return openvino.Tensor(np.ascontiguousarray(pixels[None]))
