"""Checks the format of pictures in answers, since some servers ignore `output_format`."""

from __future__ import annotations

import re

from engine_plugin.errors import InvalidRequestError

__all__ = ["require_format"]

_BEGINNINGS = {"png": b"iVBORw0KGgo", "jpeg": b"/9j/", "webp": b"UklGR"}
"""Of files in base64."""

_PICTURE = re.compile(rb'"b64_json"\s*:\s*"([^"]{0,16})')


def require_format(answer: bytes, wanted: str | None, server: str) -> None:
    """Raise InvalidRequestError if a picture in a text-to-image answer has another format than requested."""
    beginning = _BEGINNINGS.get(wanted or "", b"")
    if not all(found[1].replace(b"\\/", b"/").startswith(beginning) for found in _PICTURE.finditer(answer)):
        raise InvalidRequestError.at(
            "output_format",
            f"{server} returns pictures in its own format only, not {wanted}; leave output_format out",
        )
