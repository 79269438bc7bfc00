"""Importing OpenVINO would look up a host for statistics, and import its converter of models."""

from __future__ import annotations

import sys

__all__ = ["trim_openvino"]

_UNWANTED = ("openvino_telemetry", "openvino.tools.ovc")


def trim_openvino() -> None:
    """Have OpenVINO do without both. Call this before the first import of OpenVINO; it saves 50 ms of that."""
    for name in _UNWANTED:
        # With None, Python raises ImportError for a module, which OpenVINO expects of either.
        sys.modules[name] = None  # type: ignore[assignment]
