"""The JSON that crosses the wire, as types. Keys that a plugin adds to these are kept."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypedDict

__all__ = [
    "EngineCheck",
    "EngineConfig",
    "ModelDetails",
    "ModelEntry",
    "OperateStatus",
    "PullOptions",
    "PullProgress",
]


class OperateStatus(IntEnum):
    """What Get- and SetOperateStatus speak of."""

    STOPPED = 0
    RUNNING = 1
    ERROR = 2


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """CheckEngine's answer; true when the engine's software is installed. `detail` says which, or what is missing."""

    installed: bool
    detail: str

    def __bool__(self) -> bool:
        return self.installed


class EngineConfig(TypedDict, total=False):
    """GetConfig's answer: where the engine lives and what it would serve."""

    host: str
    origin: str
    scheme: str
    recommend_model: str
    download_url: str
    download_path: str
    engine_path: str
    exec_path: str
    exec_file: str
    device_type: str


class ModelDetails(TypedDict, total=False):
    """What a model's file says of itself."""

    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class ModelEntry(TypedDict, total=False):
    """A model in ListModels and GetRunningModels; `modified_at` is RFC 3339, `size` in bytes."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: ModelDetails


class PullProgress(TypedDict, total=False):
    """One step of a pull: `status` in words ("success" at its end), `completed` of `total` bytes (0: unknown).

    The last one has `model`, the name in the store.
    """

    status: str
    digest: str
    total: int
    completed: int
    model: str


class PullOptions(TypedDict, total=False):
    """Further keys of PullModelRequest. `source` says where `model` comes from when its name does not."""

    source: str
    sha256: str
    insecure: bool
    username: str
    password: str
    model_type: str
