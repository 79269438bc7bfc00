"""Numbers of parameters and bytes as short texts."""

from __future__ import annotations

__all__ = ["byte_size", "parameter_size"]


def _scaled(number: int, step: int, units: tuple[str, ...]) -> tuple[str, str]:
    """`number` in the largest unit that makes it 1 or more: one decimal below ten, none above."""
    value = float(number)
    for unit in units:
        digits = f"{value:.1f}".removesuffix(".0") if unit != units[0] and value < 9.95 else f"{value:.0f}"
        if float(digits) < step or unit == units[-1]:
            return digits, unit
        value /= step
    raise AssertionError("the last unit takes everything")


def parameter_size(parameters: int) -> str:
    """A number of parameters, as `1.5B`, `270M` or `130K`; "" for 0 or less, which means unknown."""
    if parameters <= 0:
        return ""
    return "".join(_scaled(parameters, 1000, ("", "K", "M", "B", "T")))


def byte_size(size: int) -> str:
    """A number of bytes as `1.5 GiB`, for messages."""
    return " ".join(_scaled(max(size, 0), 1024, ("bytes", "KiB", "MiB", "GiB", "TiB")))
