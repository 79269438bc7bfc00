"""Types of the JSON on the wire, for plugins and hosts. Additional keys of a plugin are kept."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypedDict

__all__ = [
    "EngineCheck",
    "EngineConfig",
    "LoadedModel",
    "ModelDetails",
    "ModelEntry",
    "OperateStatus",
    "PullOptions",
    "PullProgress",
]


class OperateStatus(IntEnum):
    """Whether the engine is meant to run. STOPPED keeps a host from starting it again."""

    STOPPED = 0
    RUNNING = 1
    ERROR = 2


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """Whether the engine's software is installed; `detail` names it, or what is missing. True if installed."""

    installed: bool
    detail: str

    def __bool__(self) -> bool:
        return self.installed


class EngineConfig(TypedDict, total=False):
    """GetConfig's EngineRecommendConfig: where the engine is, and its recommended model. Absent keys are empty."""

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
    """Details of a model; `context_length` is in tokens, `context_source` names its source."""

    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    capabilities: list[str]
    context_length: int
    context_source: str


class LoadedModel(TypedDict, total=False):
    """A loaded model: memory in bytes, idle time in seconds, time of unloading in RFC 3339, context in tokens."""

    memory: int
    accelerator_memory: int
    idle_s: float
    expires_at: str
    context_length: int


class ModelEntry(TypedDict, total=False):
    """A model in ListModels and GetRunningModels; `modified_at` is RFC 3339, `size` in bytes.

    `kind` is its purpose; `bundled` marks a sample model; GetRunningModels sets `loaded`. Calls accept `references`
    in place of the name.
    """

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: ModelDetails
    kind: str
    bundled: bool
    loaded: LoadedModel
    references: list[str]


class PullProgress(TypedDict, total=False):
    """A step of a pull: `status` in words ("success" at the end), `completed` and `total` in bytes (0: unknown).

    The last step has `model`, the name in the store.
    """

    status: str
    digest: str
    total: int
    completed: int
    model: str


class PullOptions(TypedDict, total=False):
    """Further keys of PullModelRequest. `source` is the source of the model if it differs from `model`."""

    source: str
    sha256: str
    insecure: bool
    username: str
    password: str
    model_type: str
