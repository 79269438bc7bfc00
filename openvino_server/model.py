"""One model from its load to its unload: its calls, and its worker, which is restarted when it dies."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine_plugin.process.python import module_command
from engine_plugin.process.restarts import Restarts
from engine_plugin.templates.jinja import BROKEN, TemplateError, Templates
from engine_plugin.templates.renderer import PROGRAM, WITHIN, Renderer
from openvino_server.errors import RequestError
from openvino_server.link import BadModelError, LoadError, Worker
from openvino_server.watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

    from openvino_server.config import ModelSpec

__all__ = ["AVAILABLE", "END", "LOADING", "UNLOADING", "Model", "ModelSettings"]

LOADING, AVAILABLE, UNLOADING, END = "LOADING", "AVAILABLE", "UNLOADING", "END"
_CHAT_SEQUENCES = 256  # OVMS's default of max_num_seqs
_STOP_WITHIN = 2.0


@dataclass(frozen=True)
class ModelSettings:
    """The settings of the server that concern models. Times in seconds, sizes in bytes.

    A worker without a sign of life is killed after `start_timeout` while it loads, after `hung_timeout` (0: never)
    while it owes answers.
    """

    threads: int = 0
    cache_dir: str = ""
    max_queue: int = 256
    memory_limit: int = 0
    load_timeout: float = 1800.0
    start_timeout: float = 60.0
    hung_timeout: float = 120.0
    drain_timeout: float = 30.0
    restart_limit: int = 3
    restart_backoff: float = 0.2
    stable_time: float = 60.0


class Model:
    """A model that is loaded, served or unloaded. `state` has OVMS's names; `error` is the reason for END."""

    def __init__(
        self, spec: ModelSpec, settings: ModelSettings, argv: Sequence[str], environ: Mapping[str, str]
    ) -> None:
        self.name = spec.name
        self.kind = spec.kind
        self.state = LOADING
        self.error = ""
        self.unusable = False
        """Whether the load failed because of the model's files."""
        self.ready_info: dict[str, Any] = {}
        self.spec = spec
        self._settings = settings
        self._argv = argv
        self._environ = environ
        self.worker: Worker | None = None
        """The process that loads or serves it; None between two."""
        self._watch: Watch | None = None
        self._renderer: Renderer | None = None
        self._death = ""  # the reason for the current restart
        self._reserved = 0
        self._calls = 0
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        at_once = spec.options.get("max_num_seqs", _CHAT_SEQUENCES) if spec.kind == "chat" else 1
        self._stop_within = _STOP_WITHIN
        self._limit = settings.max_queue + (at_once if isinstance(at_once, int) and at_once > 0 else 1)

    def start(self, after: asyncio.Task[None] | None, require_memory: Callable[[int], None]) -> None:
        """Begin the load, once `after` has ended. Called once."""
        self._task = asyncio.create_task(self._run(after, require_memory))

    async def settled(self) -> None:
        """Wait until the load has succeeded or failed."""
        while self.state == LOADING:
            await self._changed.wait()

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Worker]:
        """The worker for one call; waits while it loads or restarts. Raises RequestError.

        The model is not unloaded inside the block.
        """
        if self._calls >= self._limit:
            raise RequestError(f"model {self.name} is busy: {self._calls} calls wait already; try again later", 503)
        self._calls += 1
        try:
            await self.settled()
            if self.state == UNLOADING:
                raise RequestError(f"model: {self.name} is no longer served", 404)
            if self.state == END or self.worker is None:
                raise RequestError(f"model {self.name} could not be loaded: {self.error}", 503)
            yield self.worker
        finally:
            self._calls -= 1
            if not self._calls:
                self._notify()

    @property
    def sees(self) -> bool:
        """Whether its messages may contain pictures."""
        return "vision" in self.ready_info.get("capabilities", ())

    async def render(self, messages: list[Any], tools: list[Any], extra: dict[str, Any]) -> str:
        """The prompt of a conversation, by the model's chat template. Raises RequestError."""
        if self._renderer is None:
            raise RequestError(f"model {self.name} is being unloaded; try again", 503)
        try:
            return await self._renderer.render(messages, tools, extra)
        except TemplateError as error:
            if error.kind == BROKEN:
                raise RequestError(f"messages: {error}") from None
            raise RequestError(f"messages: the model's chat template refuses them: {error}") from None
        except (OSError, ImportError) as error:
            raise RequestError(f"messages: the model's chat template cannot be rendered: {error}", 500) from error

    @property
    def complaint(self) -> str:
        """The reason why a loaded model cannot answer now; "" if it can."""
        if self._death:
            return f"its process ended and is being restarted: {self._death}"
        return self._watch.complaint if self._watch is not None and self.state == AVAILABLE else ""

    def memory(self) -> int:
        """Bytes of memory that its process uses, or, during a load, will use at least."""
        used = self.worker.rss() if self.worker is not None else 0
        return max(used, self._reserved)

    async def retire(self) -> None:
        """Let the running calls and the worker end, both within drain_timeout, then unload. New calls are refused."""
        deadline = asyncio.get_running_loop().time() + self._settings.drain_timeout
        loading = self.state == LOADING
        if self.state != END:
            self._change(UNLOADING)
        if loading:
            self.kill()  # nothing needs the load any more
        try:
            async with asyncio.timeout_at(deadline):
                while self._calls and self.state != END:
                    await self._changed.wait()
        except TimeoutError:
            sys.stderr.write(f"W {self.name}: {self._calls} calls did not end in time and are cancelled\n")
        left = deadline - asyncio.get_running_loop().time()
        await self.aclose(max(0.0, min(left, _STOP_WITHIN)))

    async def aclose(self, within: float = _STOP_WITHIN) -> None:
        """End the worker: an idle one has `within` seconds to quit before it is killed."""
        self._stop_within = within
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._change(END, self.error)

    def kill(self) -> None:
        """Kill its process; it is not restarted when the model is UNLOADING."""
        if self.worker is not None:
            self.worker.kill_now()
        if self._renderer is not None:
            self._renderer.kill()

    # The worker and its restarts

    async def _run(self, after: asyncio.Task[None] | None, require_memory: Callable[[int], None]) -> None:
        settings, loop = self._settings, asyncio.get_running_loop()
        restarts = Restarts(settings.restart_limit, settings.restart_backoff, settings.stable_time)
        try:
            if after is not None:
                await asyncio.wait({after})
            while self.state != UNLOADING:
                async with self._loaded(require_memory) as worker:
                    since = loop.time()
                    await worker.over.wait()
                    pause = self._note_death(restarts, loop.time() - since, worker.ended_because)
                if pause is None:
                    return
                await asyncio.sleep(pause)
        except (LoadError, RequestError, OSError) as error:
            if self.state != UNLOADING:  # an unload kills a worker that still loads
                sys.stderr.write(f"E {self.name}: {error}\n")
                self.unusable = isinstance(error, BadModelError)
                self._change(END, str(error))
        except Exception as error:  # callers wait for the change of state
            self._change(END, f"{type(error).__name__}: {error}")
            raise
        finally:
            if self._renderer is not None:
                await self._renderer.aclose()

    def _note_death(self, restarts: Restarts, served: float, reason: str) -> float | None:
        """The seconds until the restart of a worker that has died; None in an unload or at the restart limit."""
        if self.state == UNLOADING:
            return None
        sys.stderr.write(f"E {self.name}: its process ended: {reason}\n")
        pause = restarts.after_death(served)
        if pause is None:
            self._change(END, f"its process ended {restarts.deaths} times in a row, at last: {reason}")
        else:
            self._death = reason
            self._change(LOADING)
        return pause

    @asynccontextmanager
    async def _loaded(self, require_memory: Callable[[int], None]) -> AsyncIterator[Worker]:
        """A worker that has loaded the model; it ends with the block. Raises LoadError, RequestError, OSError."""
        size = await asyncio.to_thread(_size, self.spec.folder)
        require_memory(size)
        self._reserved = size
        worker = Worker(self.name, size)
        await worker.spawn(self._argv, self._environ)
        self.worker = worker
        self._watch = Watch(worker, self._settings.start_timeout, self._settings.hung_timeout)
        watching = asyncio.create_task(self._watch.run())
        try:
            self.ready_info = await worker.load(self._load_settings(), self._settings.load_timeout)
            if self._renderer is None:  # one from before a restart stays
                templates = Templates(*self.ready_info.get("templates", ({}, {})))
                self._renderer = Renderer(templates, module_command(PROGRAM), self._environ, WITHIN)
            self._death = ""
            if self.state == LOADING:
                self._change(AVAILABLE)
            yield worker
        finally:
            watching.cancel()
            self._reserved = 0
            self.worker = self._watch = None
            await worker.stop(self._stop_within)

    def _load_settings(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "path": str(self.spec.folder),
            "device": self.spec.device,
            "options": self.spec.options,
            "threads": self._settings.threads,
            "cache_dir": self._settings.cache_dir,
        }

    def _change(self, state: str, error: str = "") -> None:
        self.state = state
        self.error = error
        if state == END:
            self._death = ""
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _size(folder: Path) -> int:
    """The bytes of a model's files. Raises LoadError when the folder does not exist."""
    if not folder.is_dir():
        raise LoadError(f"{folder}: the folder does not exist")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
