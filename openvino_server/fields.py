"""Fields of a request, checked: each function raises RequestError that names the field. null counts as not given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openvino_server.errors import bad_request

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["flag", "number", "text", "whole"]


def text(body: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A string; required when there is no default."""
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise bad_request(name, "must be a string")
    return value


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """true or false."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad_request(name, f"must be true or false, not {value!r}")
    return value


def whole(
    body: Mapping[str, Any], name: str, low: int, high: int | None = None, default: Any = None, shown: str = ""
) -> Any:
    """A whole number within bounds. `shown` is the field's name in the error where that differs from `name`."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise bad_request(shown or name, f"must be a whole number, {bounds}, not {value!r}")
    return value


def number(body: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    """A number within bounds; None when it is not given."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise bad_request(name, f"must be a number from {low:g} to {high:g}, not {value!r}")
    return float(value)
