"""The events of a pull.

Any number of `StepStarted` and `ChunkProgress`, then one `Success` or one `Error`. `progress_json` writes each as the
wire's ProgressResponse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TypeAlias

from engine_plugin.redaction import redacted

__all__ = ["ChunkProgress", "Error", "PullEvent", "StepStarted", "Success", "progress_json"]


@dataclass(frozen=True, slots=True)
class StepStarted:
    """A step has begun, in words: `resolving tiny-chat`, `verifying sha256`."""

    text: str


@dataclass(frozen=True, slots=True)
class ChunkProgress:
    """`completed` of `total` bytes (0: unknown) have arrived of the file with this `digest` (`sha256:…` or "")."""

    digest: str
    completed: int
    total: int


@dataclass(frozen=True, slots=True)
class Success:
    """The model is complete and verified: its name in the store, its size in bytes and `sha256:…`."""

    model: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Error:
    """The pull failed with this code; `text` says why and what to do."""

    text: str
    code: int


PullEvent: TypeAlias = StepStarted | ChunkProgress | Success | Error


def progress_json(event: PullEvent) -> bytes:
    """An event as ProgressResponse JSON. Called by the servicer for each message of PullModelStream.

    `status` is "success" only for Success, which also has the name of the model in the store; AOG does not read it.
    """
    match event:
        case StepStarted(text):
            shape: dict[str, object] = {"status": redacted(text)}
        case ChunkProgress(digest, completed, total):
            shape = {"status": "downloading", "digest": digest, "total": total, "completed": completed}
        case Success(model, size, digest):
            shape = {"status": "success", "digest": digest, "total": size, "completed": size, "model": model}
        case Error(text):
            shape = {"status": f"error: {redacted(text)}"}
    return json.dumps(shape).encode()
