"""The models that the server serves, kept in agreement with config.json.

A reload reads the whole configuration, then starts all changes at once. Models load independently, so that a slow one
delays no other; a model whose entry has changed is loaded after the calls and the process of its predecessor have
ended. All methods run on the loop.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

from engine_plugin.system.sizes import byte_size
from openvino_server.config import ConfigError, ModelSpec, read_config
from openvino_server.errors import RequestError
from openvino_server.model import AVAILABLE, END, Model

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence
    from pathlib import Path

    from openvino_server.model import ModelSettings

__all__ = ["Registry", "State"]


class Registry:
    """All models of one server. `argv` runs a worker."""

    def __init__(
        self, config: Path, settings: ModelSettings, argv: Sequence[str], environ: Mapping[str, str]
    ) -> None:
        self._config = config
        self._settings = settings
        self._argv = list(argv)
        self._environ = dict(environ)
        self._models: dict[str, Model] = {}
        self._leaving: dict[Model, asyncio.Task[None]] = {}
        self._reading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def models(self) -> Mapping[str, Model]:
        """The models that are served or being loaded, by name."""
        return self._models

    def find(self, name: object, kind: str) -> Model:
        """The model of a request. Raises RequestError."""
        if not isinstance(name, str) or not name:
            raise RequestError("model: must name a model")
        model = self._models.get(name)
        if model is None:
            raise RequestError(f"model: {name} is not served", 404, "not_found_error")
        if model.kind != kind:
            raise RequestError(f"model: {name} is a model for {model.kind}, not for {kind}")
        return model

    def states(self) -> dict[str, State]:
        """The answer of GET /v1/config."""
        shown = {model.name: model for model in self._leaving} | dict(self._models)
        return {name: _shown(model) for name, model in sorted(shown.items())}

    @property
    def healthy(self) -> bool:
        """Whether every loaded model has a worker, and none hangs."""
        return not any(model.complaint for model in self._models.values())

    async def reload(self) -> tuple[bool, list[str]]:
        """Apply config.json, and return when all changes are complete: whether there were any, and what has failed.

        Raises ConfigError before any change. A cancelled caller does not stop the changes.
        """
        async with self._reading:
            specs = await asyncio.to_thread(read_config, self._config)
            loads, removals = self._want(specs)
        for model in loads:
            await model.settled()
        if removals:
            await asyncio.wait(removals)
        failed = [
            f"{model.name}: {model.error or 'another reload has removed it again'}"
            for model in loads
            if model.state != AVAILABLE
        ]
        return bool(loads or removals), failed

    def load_soon(self) -> None:
        """Begin to load the models of config.json; called when the server starts."""
        self._background(self._first_load())

    async def _first_load(self) -> None:
        try:
            await self.reload()
        except ConfigError as error:
            sys.stderr.write(f"E {error}\n")

    def _want(self, specs: dict[str, ModelSpec]) -> tuple[list[Model], list[asyncio.Task[None]]]:
        """Start all changes at once: the loads, and the removals."""
        removals = [self._retire(self._models.pop(name)) for name in [*self._models] if name not in specs]
        loads: list[Model] = []
        for name, spec in specs.items():
            known = self._models.get(name)
            if known is not None and known.state != END and known.spec == spec:
                continue
            leaving = (task for model, task in self._leaving.items() if model.name == name)
            before = next(leaving, None) if known is None else self._retire(known)
            model = Model(spec, self._settings, self._argv, self._environ)
            self._models[name] = model
            model.start(before, partial(self._require_memory, model))
            loads.append(model)
        return loads, removals

    def _retire(self, model: Model) -> asyncio.Task[None]:
        task = self._leaving[model] = self._background(model.retire())
        task.add_done_callback(lambda _: self._leaving.pop(model, None))
        return task

    def _require_memory(self, asking: Model, size: int) -> None:
        """Raises RequestError when the model's files and the memory that all workers use exceed the limit."""
        limit = self._settings.memory_limit
        if not limit:
            return
        others = [model for model in [*self._models.values(), *self._leaving] if model is not asking]
        used = sum(model.memory() for model in others)
        if used + size > limit:
            raise RequestError(
                f"memory: {byte_size(size)} of model files do not fit: {byte_size(used)} of memory_limit's "
                f"{byte_size(limit)} are in use; unload another model, or raise memory_limit",
                503,
            )

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def kill(self) -> None:
        """End every worker at once, because the server ends."""
        for model in [*self._models.values(), *self._leaving]:
            model.kill()

    async def aclose(self) -> None:
        """End every worker and wait for it. For a server that is closed, not for one that is killed."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(model.aclose() for model in [*self._models.values(), *self._leaving]))
        self._models.clear()


class _Status(TypedDict):
    error_code: str
    """OK, UNAVAILABLE, or FAILED_PRECONDITION when the model's files are at fault."""
    error_message: str
    """With OK, the reason why the model cannot answer now; "" if it can."""


class _Version(TypedDict):
    version: str
    state: str
    status: _Status
    memory: int
    """Bytes of its worker; not in OVMS's answer."""


class State(TypedDict):
    """A model's state in GET /v1/config, in OVMS's form; it has one version."""

    model_version_status: list[_Version]


def _shown(model: Model) -> State:
    code = "OK" if not model.error else "FAILED_PRECONDITION" if model.unusable else "UNAVAILABLE"
    status: _Status = {"error_code": code, "error_message": model.error or model.complaint}
    return {
        "model_version_status": [{"version": "1", "state": model.state, "status": status, "memory": model.memory()}]
    }
