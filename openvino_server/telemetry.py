"""Importing OpenVINO would look up a host for statistics."""

from __future__ import annotations

import sys

__all__ = ["block_telemetry"]


def block_telemetry() -> None:
    """Have OpenVINO do without it. Called before anything of OpenVINO's is imported."""
    # None is how Python spells a module that must not be found; OpenVINO is content with that.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
