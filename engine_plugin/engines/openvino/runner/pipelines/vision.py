"""Pictures in messages, for models that see."""

from __future__ import annotations

import base64
import io
import struct
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.openvino.runner.pipelines import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["pictures"]

_MOST_PIXELS = 64_000_000


def pictures(sources: Sequence[str]) -> list[Any]:
    """Tensors (1, height, width, 3) of pictures given as data: URLs or bare base64. Raises RequestError."""
    return [_picture(source, f"image_url[{index}]") for index, source in enumerate(sources)]


def _picture(source: str, field: str) -> Any:
    import numpy as np
    import openvino
    from PIL import Image

    if source.startswith(("http://", "https://", "file:")):
        raise RequestError(f"{field}: send the picture itself as a data: URL; addresses are not followed")
    data = source.partition(",")[2] if source.startswith("data:") else source
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise RequestError(f"{field}: has more than {_MOST_PIXELS} pixels")
            pixels = np.asarray(image.convert("RGB"), dtype=np.uint8)
    except (ValueError, SyntaxError, OSError, struct.error, Image.DecompressionBombError) as error:
        raise RequestError(f"{field}: not a picture in base64: {error}") from error
    return openvino.Tensor(np.ascontiguousarray(pixels[None]))
