"""What the tests of the store share: a fake inspection, and ways to run a pull."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import engine_plugin
from engine_plugin.errors import InvalidRequestError
from engine_plugin.models.store import Inspection, ModelDescription
from tests.patience import LIMIT

if TYPE_CHECKING:
    from engine_plugin.download.events import PullEvent
    from engine_plugin.models.store import ModelStore, PullRequest
    from engine_plugin.plugin import Plugin

__all__ = ["SAMPLES", "Inspector", "digest_of", "files_below", "pull", "pulled"]

SAMPLES = Path(engine_plugin.__file__).parent / "samples" / "gguf"


class Inspector:
    """Takes every file that begins as GGUF does for a chat model, and counts what it was shown."""

    def __init__(self) -> None:
        self.seen: list[Path] = []

    async def __call__(self, path: Path) -> Inspection:
        self.seen.append(path)
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InvalidRequestError(f"{path.name} does not begin with GGUF.")
        return Inspection(
            "chat", ModelDescription("gguf", "llama", ("llama",), "129K", "F32", {"context_length": 8192})
        )


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files_below(root: Path) -> set[str]:
    """The files below a store's root, less the locks, which stay."""
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(root).as_posix() for path in files}


async def pulled(plugin: Plugin, request: PullRequest) -> list[PullEvent]:
    """Run a pull of a plugin to its end and return its events."""
    async with asyncio.timeout(LIMIT), plugin.pull_model(request) as events:
        return [event async for event in events]


async def pull(store: ModelStore, request: PullRequest) -> list[PullEvent]:
    """Run a pull to its end and return its events."""
    async with asyncio.timeout(LIMIT):
        return [event async for event in store.pull(request)]
