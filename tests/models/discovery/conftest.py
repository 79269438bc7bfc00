"""Plugins in the test's own process, for tests of their models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.manifest import load_manifest
from tests.leftovers import marked, nothing_is_left, scratch
from tests.shipped import write_manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine_plugin.manifest import Manifest

__all__ = ["described", "manifested", "marked", "nothing_is_left", "scratch"]

STREAMING = ("chat", "generate")


def described(place: Path, services: dict[str, dict[str, Any]], **top: Any) -> Manifest:
    """Return the manifest of a plugin in the new directory `place`; each service also has these keys."""
    shape: dict[str, Any] = {
        "version": "1.0",
        "provider": {"name": place.name, "version": "1.0.0", "type": "local"},
        "services": [
            {
                "service_name": name,
                "config_ref": f"openvino:{name}",
                "capabilities": {
                    "support_streaming": name in STREAMING,
                    "support_bidirectional": name.endswith("-ws"),
                },
                **keys,
            }
            for name, keys in services.items()
        ],
        "resources": {"data_dir": str(place / "data")},
        "engine": {"name": "small"},
        **top,
    }
    place.mkdir(exist_ok=True)
    write_manifest(place, shape)
    return load_manifest(place / "plugin.yaml")


@pytest.fixture
def manifested(tmp_path: Path) -> Callable[..., Manifest]:
    """`described` in a directory of the test's own."""

    def make(services: dict[str, dict[str, Any]], **top: Any) -> Manifest:
        return described(tmp_path / "p", services, **top)

    return make
