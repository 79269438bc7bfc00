"""The server process, the OpenVINO Model Server or the embedded server, and the models that it has in memory.

A server loads the models of its config.json when it starts, and applies changes of it on request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from engine_plugin.engines.local.driver import Condition
from engine_plugin.engines.local.server import ServerProcess
from engine_plugin.engines.openvino.client import ServerClient
from engine_plugin.engines.openvino.graphs import ServedFolder
from engine_plugin.engines.openvino.options import device_of, entry_of
from engine_plugin.engines.openvino.software import SERVER_MODULE, server_environ
from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    EngineStartError,
    ModelUnusableError,
    UnavailableError,
)
from engine_plugin.process import python
from engine_plugin.process.engine_process import Command
from engine_plugin.single_flight import SingleFlight
from engine_plugin.speech.decoder import Decoder
from engine_plugin.system.files import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from engine_plugin.engines.local.admission import Admission
    from engine_plugin.engines.local.server import Place
    from engine_plugin.engines.openvino.options import ConfigEntry, OpenVinoOptions
    from engine_plugin.install.software import Backend
    from engine_plugin.models.store import StoredModel
    from engine_plugin.process.run import ProcessRun

__all__ = ["SERVED", "ModelState", "OpenVinoServer", "ServedModel"]

log = logging.getLogger(__name__)

SERVED = "served"
"""The directory of the servers' folders, below the data directory."""

_MB = 1024 * 1024
_CONFIG_LIMIT = 16 * 1024 * 1024
_POLL_FIRST, _POLL_LAST = 0.01, 0.25
_LEAVE_TIMEOUT = 30.0
_UNLOADED = "the model was unloaded during this request"
_PASSED_ON = (
    "threads",
    "max_queue",
    "start_timeout",
    "hung_timeout",
    "drain_timeout",
    "restart_limit",
    "restart_backoff",
    "stable_time",
)
"""The options that are settings of the embedded server, too, by the same names."""


class ModelState(NamedTuple):
    """A model's state in the server, from GET /v1/config."""

    state: str
    """LOADING, AVAILABLE, UNLOADING or END, as OVMS names them."""
    complaint: str
    """The error; "" without one."""
    failed: bool
    """Whether the server has given the model up."""
    memory: int = 0
    """Bytes of memory; 0 where the server does not report them."""
    unusable: bool = False
    """Whether it failed because of its files, so that another attempt would fail as well."""


class OpenVinoServer(ServerProcess):
    """One server. Owned by the engine driver; closed once, then discarded."""

    health_path = "/v2/health/live"
    error_marks = ("E ", "[error]", "Error")
    ports_needed = 2
    _options: OpenVinoOptions

    def __init__(
        self, backend: Backend, options: OpenVinoOptions, place: Place, data: Path, *, mode: str, only_cpu: bool
    ) -> None:
        """Only the embedded server listens on a socket in the folder of `place`. `data` is the data directory, `mode`
        is StartEngine's; `only_cpu`: OpenVINO has found no other device.
        """
        listens_on = place if backend.kind == "embedded" else place._replace(folder=None)
        super().__init__("the OpenVINO server", backend, options, listens_on)
        self.load_limit = options.start_limit
        """Seconds that the load of one model may take."""
        self.served = ServedFolder(data / SERVED / secrets.token_hex(8), with_graphs=not self.is_ours)
        """The folder that the server reads, with its config.json."""
        self.decoder = Decoder(backend.site, place.environ, options.audio)
        """What decodes the audio of requests, with the packages that go with this software."""
        self._cache = str(data / "cache")
        self._mode = mode
        self._only_cpu = only_cpu
        self._entries: dict[str, ConfigEntry] = {}
        self._proved: set[str] = set()
        """The models that have been available."""
        self._writing = asyncio.Lock()

    async def close(self) -> None:
        """End the process and remove its files; running requests are cancelled."""
        await super().close()
        self.clean_up()
        await in_thread(self.served.remove)

    def client(self) -> ServerClient:
        """A client of its latest run. Raises UnavailableError when it is not up."""
        return ServerClient(self.http(), self.latest_run)

    # The steps of a run

    def launch(self) -> Command:
        """What to run. Writes the config.json of the run, which blocks for some milliseconds.

        A model that was being loaded when the server died is left out, because it may have killed the server.
        """
        self.served.write({name: entry for name, entry in self._entries.items() if name in self._proved})
        options, config = self._options, str(self.served.config)
        caches = options.cache_dir or not (self._mode == "cpu" or self._only_cpu)
        cache = (options.cache_dir or self._cache) if caches else ""
        if not self.is_ours:
            return Command(self._ovms_command(config, cache), server_environ(self.backend, self._environ))
        settings = {  # docs/openvino-server.md defines them
            "host": str(self.socket or "127.0.0.1"),
            "port": 0,
            "key": self.key,
            "config": config,
            "cache_dir": cache,
            "memory_limit": options.memory_limit * _MB,
            "load_timeout": options.start_limit,
            **{name: getattr(options, name) for name in _PASSED_ON},
        }
        argv = python.module_command(SERVER_MODULE, "serve")
        env = python.module_environ(self._environ, self.backend.site)
        return Command(argv, env, json.dumps(settings).encode() + b"\n")  # the key is in neither argv nor env

    def _ovms_command(self, config: str, cache: str) -> list[str]:
        """argv of an ovms behind the guard. It reads the key from a file; nothing calls its gRPC port."""
        argv = python.guarded([self.backend.executable])
        argv += ["--rest_port", str(self.ports[0]), "--rest_bind_address", "127.0.0.1"]
        argv += ["--port", str(self.ports[1]), "--grpc_bind_address", "127.0.0.1"]
        # 0: read the configuration on request only, not periodically.
        argv += ["--config_path", config, "--file_system_poll_wait_seconds", "0"]
        argv += ["--api_key_file", str(self._write_key_file())]
        return [*argv, "--cache_dir", cache] if cache else argv

    async def prove(self) -> None:
        """List the models, which needs the right key. Each model is tried when it is loaded."""
        await self.states()

    # The models

    async def condition(self, served: Sequence[str]) -> Condition:
        """The state of the server and of the models in `served`, for a health check."""
        own = await self.complaint()
        if own:
            return Condition([own], serves=not self.failed)
        try:
            states = await self.states() if served else {}
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

    def entry(self, model: StoredModel) -> ConfigEntry:
        """What this server gets for a model."""
        device = device_of(model.kind, self._mode, self._options, only_cpu=self._only_cpu)
        return entry_of(model, device, self._options, threads=0 if self.is_ours else self._options.threads)

    def forget(self, name: str) -> None:
        """Leave a model out of the next config.json that is written."""
        self._entries.pop(name, None)
        self._proved.discard(name)

    async def add(self, entry: ConfigEntry) -> None:
        """Have the server load a model, unless it has, and wait until it is available.

        Raises ModelUnusableError or EngineStartError with the server's reason, BadGatewayError when the server dies.
        """
        name = entry["name"]
        if self._entries.get(name) != entry or name not in self._proved:
            self.served.move_graph(name)
        self._entries[name] = entry
        try:
            async with asyncio.timeout(self.load_limit):
                await self._follow(name)
        except TimeoutError:
            raise EngineStartError(
                f"{name} was not loaded in {self.load_limit:g} s. Raise engine.start_limit in plugin.yaml if this "
                "machine is slow"
            ) from None
        self._proved.add(name)

    async def remove(self, name: str) -> None:
        """Have the server unload a model, and wait until it has; nothing when the server does not run."""
        self.forget(name)
        await self.recovered()
        if not self.ready:
            return
        try:
            async with asyncio.timeout(_LEAVE_TIMEOUT):
                await self._apply()
                pause = _POLL_FIRST
                while name not in self._entries and (await self.states()).get(name, _GONE).state != "END":
                    await asyncio.sleep(pause)
                    pause = min(pause * 1.5, _POLL_LAST)
        except (EnginePluginError, TimeoutError) as error:
            log.warning("%s: the server did not confirm the unload: %s", name, error or "no answer in time")

    async def states(self) -> dict[str, ModelState]:
        """The state of each model, by name. Raises UnavailableError and BadGatewayError."""
        async with self.client().get("/v1/config") as response:
            body = await response.read(_CONFIG_LIMIT)
        try:
            shape = json.loads(body)
            return {name: _state(entry["model_version_status"][0]) for name, entry in shape.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise BadGatewayError(f"the engine's list of models is not understood: {body[:200]!r}") from error

    async def _follow(self, name: str) -> None:
        """Apply the configuration and wait for one model. Raises ModelUnusableError and EngineStartError."""
        complaint = await self._apply()
        pause = _POLL_FIRST
        while True:
            state = (await self.states()).get(name)
            if state is not None and state.state == "AVAILABLE":
                return
            if name not in self._entries:
                raise UnavailableError(f"{name} was unloaded while it was being loaded")
            if state is None or state.failed:
                why = (state.complaint if state else "") or complaint or "the server gives no reason"
                last_output = (
                    self.latest_run.last_lines() if self.latest_run and (why == _PRECONDITION or not state) else ""
                )
                text = f"{name} cannot be loaded: {why}{f'. Last lines: {last_output}' if last_output else ''}"
                if state is not None and state.unusable:
                    raise ModelUnusableError(f"{text}. Delete the model and pull it again, or pull another")
                raise EngineStartError(text)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _POLL_LAST)

    async def _apply(self) -> str:
        """Write the configuration and have the server read it. Returns the server's complaint, or ""."""
        async with self._writing:
            await in_thread(self.served.write, dict(self._entries))
        return await self.client().reload()


_GONE = ModelState("END", "", failed=True)
_PRECONDITION = "FAILED_PRECONDITION"


def _state(shape: Mapping[str, Any]) -> ModelState:
    status = shape["status"]
    code = str(status.get("error_code") or "OK")
    state, message = str(shape["state"]), str(status.get("error_message") or "")
    if code == "OK":  # the embedded server's message is then the reason why the model cannot answer now
        memory = int(shape.get("memory") or 0)
        return ModelState(state, "" if message == "OK" else message, failed=state == "END", memory=memory)
    return ModelState(state, message or code, failed=True, unusable=code == _PRECONDITION)


class ServedModel:
    """One model in a server's memory, or being loaded. Owned by the pool; closed once, then discarded."""

    def __init__(self, model: StoredModel, entry: ConfigEntry, server: OpenVinoServer, admission: Admission) -> None:
        self.model = model
        self.admission = admission
        self._entry = entry
        self._server = server
        self._work: SingleFlight[None] = SingleFlight(f"loading {model.name}")
        self.loaded = False
        """Whether it was loaded; also true while its server is being restarted."""
        self._closed = False
        self._run: ProcessRun | None = None
        """The run of the server in which the model became available."""
        self._clients: set[ServerClient] = set()

    async def ensure_ready(self) -> None:
        """Load the model, or join a load that is under way; after a restart of the server, wait for the model.

        Raises ModelUnusableError or EngineStartError with the server's reason.
        """
        if not self.ready:
            await self._work.run(self._load)

    async def _load(self) -> None:
        try:
            await self._server.ensure_ready()
            run = self._server.latest_run
            await self._server.add(self._entry)
        except BaseException:
            self.loaded = False
            self._server.forget(self.model.name)
            if self._server.ready:  # it may still be loading the model, or list it as failed
                await self._server.remove(self.model.name)
            raise
        self._run, self.loaded = run, True

    def doubt(self) -> None:
        """Have the next request, or load, check whether the server still has the model."""
        self._run = None

    @property
    def ready(self) -> bool:
        """Whether the model has been available in this run of the server."""
        return self.loaded and self._run is self._server.latest_run and self._server.ready

    @property
    def dead(self) -> bool:
        """Whether it is not in memory, and is loaded only by the next request."""
        return not self._work.running and (not self.loaded or self._server.dead)

    @property
    def crashed(self) -> bool:
        """Whether its server served and died, and has not served for a stable time since."""
        return self._server.crashed

    @asynccontextmanager
    async def working(self) -> AsyncIterator[ServerClient]:
        """A client for one request, which fails with UnavailableError when the model leaves memory.

        After an error of the server the next request checks the model again.
        """
        if self._closed:
            raise UnavailableError(_UNLOADED)
        client = self._server.client()
        self._clients.add(client)
        try:
            yield client
        except (BadGatewayError, UnavailableError):
            self.doubt()
            raise
        finally:
            self._clients.discard(client)

    async def close(self) -> None:
        """Unload the model; running requests are cancelled."""
        self._closed = True
        self.admission.close()
        for client in self._clients:
            client.end(_UNLOADED)
        await self._work.cancel()
        await self._server.remove(self.model.name)
        self.loaded = False

    def clean_up(self) -> None:
        """Keep the model out of the server's next run."""
        self._server.forget(self.model.name)
