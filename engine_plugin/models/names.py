"""Names of models: which are valid, and which existing ones are similar.

A name becomes a file name on any system, so it is one plain segment that no file system treats specially; or,
where models are folders, two of them: `owner/name`, as hubs call their repositories.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from engine_plugin.catalogue import near_names
from engine_plugin.errors import InvalidRequestError
from engine_plugin.system.names import is_device_name

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "is_cloud_name",
    "is_model_name",
    "near_names",
    "other_case",
    "validate_model_name",
]

_SHAPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


def is_cloud_name(name: str) -> bool:
    """Whether the name is that of a model in a cloud, as Ollama's, which cannot be pulled."""
    return name.endswith((":cloud", "-cloud"))


def _complaint(name: object, *, owner: bool) -> str:
    if not isinstance(name, str):
        return "must be a string"
    if owner and "/" in name:
        first, _, rest = name.partition("/")
        return _complaint(first, owner=False) or _complaint(rest, owner=False)
    if not name:
        return "must not be empty"
    if not _SHAPE.fullmatch(name):
        return (
            f"{name[:64]!r} is not a valid model name: use 1 to 128 letters, digits, '.', '_', '+' or '-', "
            "beginning with a letter or digit"
        )
    if name.endswith("."):
        return f"{name[:64]!r} is not a valid model name: it must not end with a dot"
    if is_device_name(name):
        return f"{name[:64]!r} is not a valid model name: Windows reserves it for a device"
    return ""


def is_model_name(name: object, *, owner: bool = False) -> bool:
    """Whether `name` is a valid name of a model that is a file; with `owner` of a folder: `name` or `owner/name`."""
    return not _complaint(name, owner=owner)


def validate_model_name(name: object, *, owner: bool = False) -> str:
    """Return `name` if `is_model_name`. Raises InvalidRequestError about `model`."""
    complaint = _complaint(name, owner=owner)
    if complaint:
        raise InvalidRequestError.at("model", f"{complaint}.")
    return str(name)


def other_case(name: str, existing: Iterable[str]) -> str:
    """The existing name that differs from `name` only by case, or "".

    On a case-insensitive file system both would be one file.
    """
    folded = name.casefold()
    return next((other for other in existing if other != name and other.casefold() == folded), "")
