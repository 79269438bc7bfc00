"""Tests that need one of the package's extras."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

__all__ = ["needs"]


def needs(module: str) -> None:
    """Skip the test, or the whole file that calls it while it is imported, where `module` is not installed.

    Unlike `pytest.importorskip` it does not import it: OpenVINO takes a quarter of a second, in every worker.
    """
    if find_spec(module) is None:
        pytest.skip(f"needs {module}, which comes with an extra", allow_module_level=True)
