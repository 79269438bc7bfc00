"""Pulling a model from a web server on this machine, beside curl and sha256sum, which do the least that is needed."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from benchmarks.helpers import helper
from benchmarks.results import PLUGIN, Row
from benchmarks.targets import COMMAND, MODEL_FILE, write_plugin
from engine_plugin.host import launch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from benchmarks.results import Results
    from engine_plugin.host import PluginClient

__all__ = ["Puller", "puller"]

_CURL = "curl, then sha256sum"
_NAME = "large"
_START_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class Puller:
    """A plugin with llama.cpp, and a file of `size` bytes to pull."""

    client: PluginClient
    url: str
    size: int
    scratch: Path

    async def round(self, results: Results) -> None:
        """Pull the file both ways, and delete it."""
        row = Row("pulling a model", f"{self.size >> 20} MiB", "MB/s", "rate", (_CURL, PLUGIN))
        began = time.perf_counter()
        copy = self.scratch / "copy.gguf"
        for command in (("curl", "--silent", "--fail", "--output", str(copy), self.url), ("sha256sum", str(copy))):
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
            if await process.wait():
                raise RuntimeError(f"{command[0]} failed; its last words are above")
        results.add(row, _CURL, [self._rate(began)])
        copy.unlink()
        began = time.perf_counter()
        await self.client.pull_model(self.url)
        results.add(row, PLUGIN, [self._rate(began)])
        await self.client.delete_model(_NAME)

    def _rate(self, began: float) -> float:
        return self.size / (time.perf_counter() - began) / 1e6


@asynccontextmanager
async def puller(scratch: Path, mebibytes: int) -> AsyncIterator[Puller | None]:
    """Ready to pull; None without curl, sha256sum or xllamacpp. Ends all processes when left."""
    if not (shutil.which("curl") and shutil.which("sha256sum") and find_spec("xllamacpp")):
        yield None
        return
    served = scratch / "served"
    served.mkdir()
    file = served / f"{_NAME}.gguf"
    shutil.copy(MODEL_FILE, file)
    with file.open("ab") as model:  # what follows a model's last tensor does not matter
        for _ in range(mebibytes):
            model.write(bytes(1024 * 1024))
    folder = write_plugin(scratch / "puller", {"backend": "xllamacpp"}).parent
    async with helper("benchmarks.files", str(served)) as server:
        url = f"http://127.0.0.1:{await server.answer()}/{file.name}"
        async with await launch(COMMAND, name="plugin", cwd=folder, start_timeout=_START_TIMEOUT) as client:
            yield Puller(client, url, file.stat().st_size, scratch)
