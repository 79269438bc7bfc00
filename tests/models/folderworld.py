"""What the tests of model folders share: a fake engine, a store beside a hub, ways to run a pull."""

from __future__ import annotations

import hashlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from engine_plugin.download.events import Success
from engine_plugin.errors import PullError
from engine_plugin.models.info import Inspection, ModelDescription
from engine_plugin.models.store import FetchPolicy, ModelStore
from tests.models.hub import MODEL, REPOSITORY, hub_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from engine_plugin.models.info import Samples
    from tests.models.hub import HubServer

__all__ = [
    "DONE",
    "NEEDED",
    "SIZE",
    "SOURCES",
    "FolderWorld",
    "below",
    "choose",
    "folder_world",
    "lay_out",
    "tree_digest",
]

NEEDED = {path: data for path, data in MODEL.items() if not path.endswith(".py")}
SIZE = sum(len(data) for data in NEEDED.values())
SOURCES = (f"hf:{REPOSITORY}", f"ms:{REPOSITORY}")
POLICY = FetchPolicy(connect_s=5, stall_s=5, attempts=3, backoff_s=0.01, longest_wait_s=2)


def choose(paths: Sequence[str]) -> list[str]:
    if "config.json" not in paths:
        raise PullError("config.json is missing")
    return [path for path in paths if not path.endswith(".py")]


def tree_digest(files: Mapping[str, bytes]) -> str:
    lines = sorted(f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in files.items())
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


DONE = Success(REPOSITORY, SIZE, tree_digest(NEEDED))


def below(folder: Path) -> list[Path]:
    """A folder and all in it, less locks, which stay."""
    return [folder, *(path for path in folder.rglob("*") if path.suffix != ".lock")]


def lay_out(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write a model's files into a folder."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


class FolderWorld:
    """A hub, and a store that pulls from it. `inspected` are the folders that the engine was shown."""

    def __init__(self, root: Path, hub: HubServer, samples: Samples | None = None) -> None:
        self.root = root
        self.hub = hub
        self.place = root.joinpath(*REPOSITORY.split("/"))
        self.inspected: list[Path] = []
        self.environ = {"HF_ENDPOINT": hub.url(""), "MODELSCOPE_ENDPOINT": hub.url("/")}
        self.samples = samples
        self.store = self.another()

    def another(self, policy: FetchPolicy = POLICY) -> ModelStore:
        """A store over the same folder, as another start of the plugin has it."""
        return ModelStore(
            self.root,
            inspect=self._inspect,
            choose=choose,
            samples=self.samples,
            policy=policy,
            environ=self.environ,
        )

    async def _inspect(self, path: Path) -> Inspection:
        self.inspected.append(path)
        if b"no model" in (path / "config.json").read_bytes():
            raise PullError("config.json says so")
        return Inspection("chat", ModelDescription("toy", "toy", ("toy",), "1K", "F32", {"context_length": 128}))

    def content(self, folder: Path | None = None) -> dict[str, bytes]:
        """The files of the model."""
        folder = folder or self.place
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def leftovers(self) -> set[str]:
        """What is below .partial, less the locks, which stay."""
        partial = self.root / ".partial"
        return {p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.suffix != ".lock"}


@asynccontextmanager
async def folder_world(root: Path, samples: Samples | None = None) -> AsyncIterator[FolderWorld]:
    async with hub_server() as hub:
        world = FolderWorld(root, hub, samples)
        try:
            yield world
        finally:
            await world.store.aclose()
