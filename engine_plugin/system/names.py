"""File names that an operating system treats specially."""

from __future__ import annotations

import re

__all__ = ["is_device_name"]

_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE | re.DOTALL)


def is_device_name(name: str) -> bool:
    """Whether Windows uses the name of a file, with any extension, for a device.

    See Microsoft, Naming Files, Paths, and Namespaces.
    """
    return _DEVICE.fullmatch(name) is not None
