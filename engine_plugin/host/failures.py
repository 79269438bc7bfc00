"""A plugin's errors, read from its answers: the classes of `engine_plugin.errors` with the ids and fields sent."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from engine_plugin import errors
from engine_plugin.catalogue import CATALOGUE
from engine_plugin.errors import ERROR_FIELDS, ERROR_ID, EnginePluginError, ManifestError, PluginProcessError
from engine_plugin.jsontext import JsonError, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["error_of", "identified", "is_success"]

_ID = re.compile(r"[a-z][a-z0-9-]{0,63}")
_MOST_FIELDS = 8 << 10
"""Bytes of the fields that are read; this package's plugins send fewer (errors.MOST_FIELDS)."""

_HERE = (ManifestError, PluginProcessError)
"""Classes that only this side raises."""


def _class_of_id() -> dict[str, type[EnginePluginError]]:
    tree = (getattr(errors, name) for name in errors.__all__)
    kinds = [kind for kind in tree if isinstance(kind, type) and issubclass(kind, EnginePluginError)]
    general = {kind.id: kind for kind in kinds if kind not in _HERE}
    return general | {entry.id: entry.raises for entry in CATALOGUE.values()}


_CLASS_OF_ID = _class_of_id()


def is_success(code: int) -> bool:
    """Whether a response's `code` means success (AOG plugin SDK: 0 or 200)."""
    return code in (0, 200)


def error_of(code: int, message: str, metadata: Mapping[str, str]) -> EnginePluginError:
    """The error that a response's `code` and `message`, and the metadata of its message or call, stand for."""
    message = message or f"the plugin answered with code {code}"
    return identified(errors.error_for_code(code, message), metadata)


def identified(error: EnginePluginError, metadata: Mapping[str, str]) -> EnginePluginError:
    """The error with the id and fields that metadata has, as the class of that id.

    Without an id, as from plugins of other makers, and for one that this version does not know, the class stays.
    """
    name = metadata.get(ERROR_ID, "")
    if not _ID.fullmatch(name):
        return error
    kind = _CLASS_OF_ID.get(name)
    if kind is not None and kind.code == error.code:  # HealthCheck has 503 whatever the reason
        error = kind(str(error))
    error.id, error.fields = name, _fields(metadata.get(ERROR_FIELDS, ""))
    return error


def _fields(text: str) -> dict[str, Any]:
    try:
        fields = read_json(text.encode(), _MOST_FIELDS)
    except (JsonError, UnicodeEncodeError):
        return {}
    return fields if isinstance(fields, dict) else {}
