"""The JSON that crosses the wire, as types. Keys that a plugin adds to these are kept."""

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
    """What is known of a model; `context_length` in tokens, and who said so."""

    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    capabilities: list[str]
    context_length: int
    context_source: str


class LoadedModel(TypedDict, total=False):
    """How a model is in memory: bytes, seconds since its last use, RFC 3339 for when it leaves, tokens."""

    memory: int
    accelerator_memory: int
    idle_s: float
    expires_at: str
    context_length: int


class ModelEntry(TypedDict, total=False):
    """A model in ListModels and GetRunningModels; `modified_at` is RFC 3339, `size` in bytes.

    `kind` is what it is for, a `bundled` one a sample; GetRunningModels has `loaded`. Calls may name it by one of
    `references`, too.
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
