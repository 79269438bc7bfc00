"""The plugin.yaml files that the package comes with, and changed ones for a test's own plugin.

Hundreds of tests start from one: each is read once, and written by libyaml where PyYAML was built with it, since
the pure parser and emitter took longer than the rest of such a test.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["REPOSITORY", "shipped", "write_manifest"]

REPOSITORY = Path(__file__).parents[1]
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def shipped(engine: str) -> dict[str, Any]:
    """What stands in the plugin.yaml for `engine`, for the caller to change."""
    return copy.deepcopy(_read(engine))


def write_manifest(folder: Path, shape: Mapping[str, Any]) -> Path:
    """Write `shape` as the plugin.yaml of `folder`, which exists; its path."""
    path = folder / "plugin.yaml"
    path.write_text(yaml.dump(shape, Dumper=_DUMPER, sort_keys=False), encoding="utf-8")
    return path


@cache
def _read(engine: str) -> dict[str, Any]:
    folder = REPOSITORY if engine == "openvino" else REPOSITORY / "plugins" / engine
    shape: dict[str, Any] = yaml.safe_load((folder / "plugin.yaml").read_text(encoding="utf-8"))
    return shape
