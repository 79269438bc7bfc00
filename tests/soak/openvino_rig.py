"""The default plugin under test: all eight services on the embedded server, and what can be seen of both."""

from __future__ import annotations

import asyncio
import re
import tempfile
import uuid
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.errors import ModelNotLoadedError
from tests.patience import patience
from tests.shipped import shipped, write_manifest
from tests.soak.rig import Log, Observer, launched, left_behind, sweep
from tests.soak.watched_plugin import RUNNER_SOCKET_VARIABLE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from engine_plugin.host import PluginClient
    from tests.soak.rig import Snapshot

__all__ = ["MODELS", "OpenVinoRig", "openvino_rig"]

MODELS = {
    "chat": "tiny-chat",
    "embed": "tiny-embed",
    "rerank": "tiny-rerank",
    "text-to-image": "tiny-image",
    "speech-to-text": "tiny-transcribe",
    "text-to-speech": "tiny-speak",
}
_LIMIT = patience(5)  # seconds for any single step of setting up and ending
_SETTLE = patience(5)
_LOOK = 0.5
_IDLE = 5.0  # seconds after which an unused connection is closed, at the next health check
_EXPECTED_ERRORS = re.compile(r"the OpenVINO server (died|ended|hangs)")


class OpenVinoRig:
    """A launched plugin with its server. Made by `openvino_rig`."""

    def __init__(self, scratch: Path, mark: str, client: PluginClient, log: Log) -> None:
        if client.pid is None:
            raise RuntimeError("the plugin has no process")
        self.scratch = scratch
        self.client = client
        self.log = log
        self.plugin = Observer(psutil.Process(client.pid), scratch / "watch")
        self._runner = scratch / "watch-runner"
        self._mark = mark
        self.server: Observer | None = None

    def workers(self) -> dict[str, psutil.Process]:
        """The processes that hold models, by their age, the oldest first."""
        found = [process for process in self._below() if _is(process, "openvino_server.worker")]
        return {str(process.pid): process for process in found}

    def _below(self) -> list[psutil.Process]:
        return sorted(self.plugin.process.children(recursive=True), key=lambda process: process.create_time())

    async def where(self) -> list[str]:
        """What each of the plugin's tasks waits for."""
        return await self.plugin.where()

    async def rest(self, goal: tuple[Snapshot, Snapshot] | None = None) -> tuple[Snapshot, Snapshot]:
        """Unload every model and wait, not for ever, until the plugin and its server are at rest, as in `goal`; how
        they are then."""
        await self._unload_all()
        server = await self._watched_server()
        loop = asyncio.get_running_loop()
        began = loop.time()
        before = await self.plugin.look(), await server.look()
        while loop.time() < began + _SETTLE:
            await asyncio.sleep(_LOOK)
            now = await self.plugin.look(), await server.look()
            calm = all(_as_calm(one, other) for one, other in zip(now, goal or before, strict=True))
            if calm and loop.time() > began + _IDLE:
                break
            before = now
        return await self.plugin.look(deep=True), await server.look(deep=True)

    async def _unload_all(self) -> None:
        async with asyncio.timeout(_LIMIT):
            while loaded := await self.client.running_models():
                with suppress(ModelNotLoadedError):
                    await self.client.unload_model(*(model["name"] for model in loaded), timeout=_LIMIT)

    async def _watched_server(self) -> Observer:
        """The server that runs now."""
        [process] = [process for process in self._below() if _is(process, "soak.watched_runner")]
        if self.server is None or self.server.process != process:
            self.server = Observer(process, self._runner)
        return self.server

    async def end(self) -> list[str]:
        """End the plugin as a host does, and return what is left."""
        for observer in (self.plugin, self.server):
            if observer is not None:
                observer.close()
        await self.client.kill()
        return left_behind(self.client, self._mark, self.scratch)


def _as_calm(now: Snapshot, goal: Snapshot) -> bool:
    return now.children <= 1 and now.tasks == goal.tasks and now.fds == goal.fds


def _is(process: psutil.Process, word: str) -> bool:
    try:
        return any(word in argument for argument in process.cmdline())
    except psutil.Error:
        return False


@asynccontextmanager
async def openvino_rig(engine: Mapping[str, Any]) -> AsyncIterator[OpenVinoRig]:
    """A plugin with these engine options, its engine started. Leaves nothing behind, whatever the plugin left."""
    scratch = Path(tempfile.mkdtemp(prefix="eps-"))
    mark = uuid.uuid4().hex
    log = Log(_EXPECTED_ERRORS)
    try:
        async with AsyncExitStack() as cleanup:
            _lay_out(scratch, engine)
            watch = {RUNNER_SOCKET_VARIABLE: str(scratch / "watch-runner")}
            client = await cleanup.enter_async_context(await launched(scratch, mark, log, **watch))
            made = OpenVinoRig(scratch, mark, client, log)
            await client.start_engine(timeout=_LIMIT)
            yield made
    finally:
        sweep(mark, scratch)


def _lay_out(scratch: Path, engine: Mapping[str, Any]) -> None:
    (scratch / "tmp").mkdir()
    shape = shipped("openvino")
    shape["engine"] |= {"backend": "embedded", **engine}
    shape["resources"]["data_dir"] = str(scratch / "data")
    write_manifest(scratch, shape)
