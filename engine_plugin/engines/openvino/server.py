"""The server process, the OpenVINO Model Server or the embedded server, which holds all models."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_plugin.engines.local.admission import Admission
from engine_plugin.engines.local.driver import Condition
from engine_plugin.engines.openvino import command
from engine_plugin.engines.openvino.entries import device_of, entry_of
from engine_plugin.engines.openvino.loaded_models import LoadedModel, LoadedModels, SharedServer
from engine_plugin.errors import EnginePluginError
from engine_plugin.process.engine_process import Command
from engine_plugin.system.files import in_thread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from engine_plugin.engines.local.server import Address
    from engine_plugin.engines.openvino.options import OpenVinoOptions
    from engine_plugin.install.software import Backend
    from engine_plugin.models.store import StoredModel
    from engine_plugin.process.records import ProcessRecords

__all__ = ["OpenVinoServer", "Place"]

log = logging.getLogger(__name__)

_MB = 1024 * 1024
_AT_ONCE = 4
"""Requests that a model with one at a time gets at once, so that the next one begins without delay."""


@dataclass(frozen=True, slots=True)
class Place:
    """The directories of one server: `sockets`, private, for its unix socket (None: it listens on a port), `served`,
    created for its config.json, and `cache` for compiled models."""

    sockets: Path | None
    served: Path
    cache: Path


class OpenVinoServer(SharedServer):
    """One server. Owned by the engine driver; closed once, then discarded."""

    def __init__(
        self,
        backend: Backend,
        options: OpenVinoOptions,
        place: Place,
        records: ProcessRecords,
        environ: Mapping[str, str],
        *,
        mode: str,
        only_cpu: bool,
    ) -> None:
        """`mode` is StartEngine's; `only_cpu`: OpenVINO has found no other device."""
        self._backend = backend
        self._options = options
        self._place = place
        self._environ = environ
        self._mode = mode
        self._only_cpu = only_cpu
        self.is_ours = is_ours = backend.kind == "embedded"
        self.loaded = LoadedModels(place.served, self, options.start_limit)
        super().__init__(
            "the OpenVINO server",
            options,
            records,
            place.sockets if is_ours else None,
            health_path="/v2/health/live",
            chosen_ports=0 if is_ours else 2,
            is_ours=is_ours,
            error_marks=("E ", "[error]", "Error"),
        )

    async def close(self) -> None:
        """End the process and remove its files; running requests are cancelled."""
        await super().close()
        self.clean_up()
        await in_thread(self.loaded.remove_folder)

    def model(self, model: StoredModel) -> LoadedModel:
        """A model for the pool, which loads it."""
        options = self._options
        device = device_of(model.kind, self._mode, options, only_cpu=self._only_cpu)
        threads = 0 if self.is_ours else options.threads
        entry = entry_of(model, device, options, threads=threads)
        at_once = options.parallel if model.kind in ("chat", "embed", "rerank") else min(options.parallel, _AT_ONCE)
        return LoadedModel(model, entry, self, self.loaded, Admission(at_once, options.max_queue))

    async def condition(self, served: Sequence[str]) -> Condition:
        """The state of the server and of the models in `served`, for a health check."""
        own = await self.complaint()
        if own:
            return Condition([own], serves=not self.failed)
        try:
            states = await self.loaded.states() if served else {}
        except EnginePluginError as error:
            return Condition([f"{self.name} does not report its models: {error}"])
        wrong = []
        lost = 0
        for name in served:
            state = states.get(name)
            if state is None or state.failed:
                lost += 1
                wrong.append(f"{name} is not served: {(state and state.complaint) or 'its process has ended'}")
            elif state.state != "AVAILABLE":
                wrong.append(f"{name} is being loaded again{f': {state.complaint}' if state.complaint else ''}")
            elif state.complaint:
                wrong.append(f"{name} does not answer: {state.complaint}")
        return Condition(wrong, serves=not served or lost < len(served))

    def launch(self, address: Address) -> Command:
        self.loaded.begin_run()
        settings = self._settings(address)
        env = command.environ_of(self._environ, self._backend)
        if self.is_ours:
            return Command(command.server_command(), env, command.settings_line(settings))
        argv = command.ovms_command(self._backend, settings, self._write_key_file(), address.ports[1])
        return Command(argv, env)

    def _settings(self, address: Address) -> command.ServerSettings:
        options = self._options
        cached = options.cache_dir or not (self._mode == "cpu" or self._only_cpu)
        return command.ServerSettings(
            host=str(address.socket) if address.socket is not None else "127.0.0.1",
            port=address.ports[0] if address.ports else 0,
            key=address.key,
            config=str(self.loaded.config),
            threads=options.threads,
            max_queue=options.max_queue,
            cache_dir=str(self._place.cache) if cached else "",
            memory_limit=options.memory_limit * _MB,
            load_timeout=options.start_limit,
            start_timeout=options.start_timeout,
            hung_timeout=options.hung_timeout,
            drain_timeout=options.drain_timeout,
            restart_limit=options.restart_limit,
            restart_backoff=options.restart_backoff,
            stable_time=options.stable_time,
        )

    async def prove(self) -> None:
        """List the models, which needs the right key. Each model is tried when it is loaded."""
        await self.loaded.states()
