"""config.json: the models that the server serves (docs/openvino-server.md has its form)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ConfigError", "ModelSpec", "read_config"]


class ConfigError(ValueError):
    """config.json is missing or not valid. The models that are served stay unchanged."""


@dataclass(frozen=True)
class ModelSpec:
    """One model of config.json. `options` have the names of OVMS's calculator options."""

    name: str
    kind: str
    folder: Path
    device: str = "CPU"
    options: dict[str, Any] = field(default_factory=dict)


def read_config(path: Path) -> dict[str, ModelSpec]:
    """The models by name; a relative `folder` is below the file's own. Blocks. Raises ConfigError."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["models"]
        specs = [_spec(path, **entry) for entry in entries]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ConfigError(f"{path}: not a valid configuration: {error}") from None
    found = {spec.name: spec for spec in specs}
    if len(found) != len(specs):
        raise ConfigError(f"{path}: two models have the same name")
    return found


def _spec(path: Path, *, name: str, kind: str, folder: str, device: str = "CPU", options: object = None) -> ModelSpec:
    """Raises TypeError for another member, or a value of another type."""
    if not all(isinstance(text, str) for text in (name, kind, folder, device)):
        raise TypeError("name, kind, folder and device must be strings")
    if not isinstance(options, dict | None):
        raise TypeError(f"{name}: options must be an object")
    return ModelSpec(name, kind, path.parent / folder, device or "CPU", options or {})
