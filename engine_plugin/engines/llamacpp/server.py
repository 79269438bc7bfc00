"""One loaded model: its process, its HTTP client and its queue."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from engine_plugin.engines import ports
from engine_plugin.engines.admission import Admission
from engine_plugin.engines.health import HealthPolicy
from engine_plugin.engines.http1 import Http1Client
from engine_plugin.engines.llamacpp import command
from engine_plugin.engines.process import Command, EngineProcess, ProcessSpec, ProcessState
from engine_plugin.engines.restarts import RestartPolicy
from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    EngineStartError,
    InvalidRequestError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.files import in_thread, private_folder
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from engine_plugin.engines.http1 import HttpResponse, Response
    from engine_plugin.engines.life import Life
    from engine_plugin.engines.llamacpp.options import LlamaCppOptions
    from engine_plugin.engines.llamacpp.software import Backend
    from engine_plugin.engines.records import ProcessRecords
    from engine_plugin.models.store import ModelInfo

__all__ = ["PATHS", "ModelServer"]

PATHS = {
    "chat": "/v1/chat/completions",
    "generate": "/v1/completions",
    "embed": "/v1/embeddings",
    "rerank": "/v1/rerank",
}

_PROBES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("generate", {"prompt": "a", "max_tokens": 1, "cache_prompt": False}),
    "embed": ("embed", {"input": "a"}),
    "rerank": ("rerank", {"query": "a", "documents": ["a"]}),
}
_HEALTH_TIMEOUT = 2.0
_PROBE_TIMEOUT = 30.0
_ERROR_LIMIT = 256 * 1024
_DEATH_NOTICE = 1.0
_TCP_ATTEMPTS = 3
_TOO_LARGE = "is too large to process"


class ModelServer:
    """A llama.cpp process that serves one model. Owned by the pool; stopped once, then thrown away."""

    def __init__(
        self,
        model: ModelInfo,
        backend: Backend,
        options: LlamaCppOptions,
        *,
        gpu_layers: int,
        folder: Path | None,
        records: ProcessRecords,
        environ: Mapping[str, str],
    ) -> None:
        """`folder` is a private directory for the socket; None: serve on a loopback port."""
        self.model = model
        self._backend = backend
        self._options = options
        self._ticket = records.ticket()
        self._environ = environ
        self._gpu_layers = gpu_layers
        self._key_folder = folder or records.folder
        self._socket = None if folder is None else folder / f"{secrets.token_hex(4)}.sock"
        self._key = ""
        self._key_file: Path | None = None
        self._port = self._own_port = 0
        """The port of this life; the same once the process was seen to listen there."""
        self._client: Http1Client | None = None
        self.admission = Admission(options.parallel, options.max_queue)
        self.process = self._new_process()

    async def ensure_ready(self) -> None:
        """Load the model, sharing a load that is under way. Raises EngineStartError with llama.cpp's reason."""
        for attempt in range(_TCP_ATTEMPTS):
            try:
                await self.process.ensure_ready()
                return
            except EngineStartError as error:
                # A port picked for a llama-server may have been taken before it bound it: the next life has another.
                port = self._port
                rival = await in_thread(ports.holder, port) if port else ""
                if not rival:
                    raise
                if attempt == _TCP_ATTEMPTS - 1:
                    raise EngineStartError(f"port {port} is held by {rival}. {error}") from error

    @property
    def dead(self) -> bool:
        """Whether no process is there, and none will come unless somebody asks."""
        return self.process.ended.is_set()

    @property
    def crashed(self) -> bool:
        """Whether it served and died, and has not proved itself since."""
        return self.process.restarts > 0

    @property
    def ready(self) -> bool:
        """Whether the model is loaded and its process alive."""
        return self.process.state in (ProcessState.READY, ProcessState.DEGRADED)

    async def complaint(self) -> str:
        """Ask how it is; what is wrong with it, in words, "" when nothing is."""
        await self.process.check()
        match self.process.state:
            case ProcessState.DEGRADED:
                return f"{self.model.name} does not answer: it is busy, or hangs"
            case ProcessState.STOPPING | ProcessState.RECOVERING if self.process.life and self.process.life.failure:
                return f"{self.model.name} is being restarted: {self.process.life.failure}"
            case ProcessState.FAILED:
                return self.process.failure
        return ""

    async def recovered(self) -> None:
        """Wait while it is being restarted. It may die while somebody waits for a turn."""
        await self.process.recovered()

    async def stop(self) -> None:
        """End the process and wait for it; requests under way break off."""
        await self.process.stop()

    def clean_up(self) -> None:
        """Remove what a process that has ended leaves: our idle connections to it, its socket and its key's file."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)
        self._forget_key_file()

    def _forget_key_file(self) -> None:
        """A llama-server has read the key when it is up."""
        if self._key_file is not None:
            self._key_file.unlink(missing_ok=True)

    async def healthy(self) -> bool:
        """Whether the server answers /health in time."""
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT), self._require_client().request("GET", "/health") as response:
                await response.read(_ERROR_LIMIT)
                return response.status == 200
        except (EnginePluginError, TimeoutError):
            return False

    def _heard(self) -> bool:
        """Whether the server has sent anything since this was last asked."""
        client = self._client
        heard = client is not None and client.heard
        if client is not None:
            client.heard = False
        return heard

    @asynccontextmanager
    async def post(self, service: str, body: bytes) -> AsyncIterator[HttpResponse]:
        """Send a request; yields the answer once its head has arrived and is good.

        llama.cpp's own complaints become InvalidRequestError and so on; the death of the process becomes
        BadGatewayError with its last words.
        """
        exchange = self._require_client().request("POST", PATHS[service], body)
        life = self.process.life
        try:
            async with exchange as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.read(_ERROR_LIMIT))
                yield response
        except (BadGatewayError, UnavailableError) as error:
            if not exchange.broken or life is None:
                raise
            raise await _explained(error, life) from error

    def _require_client(self) -> Http1Client:
        if self._client is None:
            raise UnavailableError(f"the server of {self.model.name} is not up yet")
        return self._client

    def _new_process(self) -> EngineProcess:
        options = self._options
        return EngineProcess(
            ProcessSpec(
                name=f"llama.cpp for {self.model.name}",
                command=self._command,
                ready=self._ready,
                healthy=self.healthy,
                heard=self._heard,
                start_timeout=options.start_timeout,
                start_limit=options.start_limit,
                stop_timeout=options.stop_timeout,
                stop_by_stdin=self._is_ours,
                health=HealthPolicy(
                    interval=options.health_interval,
                    failures=options.health_failures,
                    hung_after=options.hung_timeout,
                ),
                restart=RestartPolicy(
                    limit=options.restart_limit, backoff=options.restart_backoff, stable=options.stable_time
                ),
                error_marks=(" E ", "E cannot", "error", "Error"),
                on_output=self._hear_address,
                on_spawn=self._ticket.add,
                on_end=self._ticket.remove,
                stragglers=self._ticket.stragglers,
            )
        )

    @property
    def _is_ours(self) -> bool:
        """Whether our own runner serves, not a llama-server."""
        return self._backend.kind == "xllamacpp"

    def _command(self) -> Command:
        """What to run for one life, with a key and, where it needs one, a port of its own."""
        self.clean_up()
        self._key = secrets.token_urlsafe(24)
        self._own_port = 0
        self._port = 0 if self._socket is not None or self._is_ours else ports.free_port()
        settings = self._settings()
        if self._socket is not None:
            self._connect_to(str(self._socket))
        elif self._port:
            self._connect_to((settings.host, self._port))
        return Command(
            argv=command.runner_command() if self._is_ours else self._llama_server(settings),
            env=command.server_environ(self._environ, self._backend, self._ticket.environ),
            stdin=command.runner_stdin(settings) if self._is_ours else b"",
        )

    def _settings(self) -> command.ServerSettings:
        details = self.model.details.extra
        trained = int(details.get("context_length") or 0)
        wanted = self._options.context_length
        rerank = self.model.kind == "rerank"
        pooling = str(details.get("pooling") or "NONE")
        if self._socket is not None:
            host, port = str(self._socket), 8080
        else:
            host, port = "127.0.0.1", self._port
        return command.ServerSettings(
            model=str(self.model.path),
            alias=self.model.name,
            kind=self.model.kind,
            pooling="RANK" if rerank else "MEAN" if pooling in ("NONE", "RANK") else "",
            host=host,
            port=port,
            key=self._key,
            context_length=min(wanted, trained) if trained else wanted,
            parallel=self._options.parallel,
            threads=self._options.threads,
            gpu_layers=self._gpu_layers,
        )

    def _llama_server(self, settings: command.ServerSettings) -> list[str]:
        if self._key_file is None:
            private_folder(self._key_folder)
            self._key_file = self._key_folder / f"{secrets.token_hex(4)}.key"
        self._key_file.touch(mode=0o600)
        self._key_file.write_text(self._key + "\n")
        return command.server_command(self._backend, settings, self._key_file)

    def _connect_to(self, address: str | tuple[str, int]) -> None:
        self._client = Http1Client(address, {"authorization": f"Bearer {self._key}"})

    def _hear_address(self, line: str) -> None:
        """The runner's `{"address": …}` line, which tells the port that was free."""
        found = re.search(r'"address": "http://127\.0\.0\.1:(\d+)', line)
        if found and self._client is None:
            self._connect_to(("127.0.0.1", int(found.group(1))))

    async def _ready(self) -> bool:
        """Ready is a real answer: /health says 200 before anything was ever computed."""
        if self._client is None or (self._socket is not None and not self._socket.exists()):
            return False
        if self._port and not await self._listens():
            return False
        if not await self.healthy():
            return False
        service, request = _PROBES[self.model.kind]
        async with asyncio.timeout(_PROBE_TIMEOUT), self._ask(service, request) as response:
            if response.status != 200:
                raise _refusal(response.status, await response.read(_ERROR_LIMIT))
            await response.read(_ERROR_LIMIT)
        self._forget_key_file()
        return True

    async def _listens(self) -> bool:
        """Whether the process that we started holds its port, which anybody could have taken. Asked before a word,
        or the key, goes there. Raises UnavailableError when somebody else holds it."""
        pid, port = self.process.pid, self._port
        if port == self._own_port or (pid is not None and await in_thread(ports.listens, pid, port)):
            self._own_port = port
            return True
        rival = await in_thread(ports.holder, port)
        if not rival or (pid is not None and await in_thread(ports.listens, pid, port)):
            return False  # nobody, or our own, which came between the two looks
        raise UnavailableError(f"port {port} is held by {rival}")

    def _ask(self, service: str, request: dict[str, Any]) -> Response:
        return self._require_client().request("POST", PATHS[service], json.dumps(request).encode())


async def _explained(error: EnginePluginError, life: Life) -> EnginePluginError:
    """Say why the connection broke, when the reason is that the process of that life is gone."""
    if not await comes_true(life.over.wait(), within=_DEATH_NOTICE):
        return error
    if life.failure:
        return BadGatewayError(life.failure)
    return UnavailableError("the engine was stopped while it worked on this request")


def _refusal(status: int, body: bytes) -> EnginePluginError:
    """llama.cpp's error answer `{"error": {code, message, type}}` as our exception."""
    message = body[:500].decode("utf-8", "replace")
    try:
        shape = json.loads(body)["error"]
        message = str(shape["message"])
    except (ValueError, KeyError, TypeError):
        shape = {}
    return refusal_error(status, str(message), shape if isinstance(shape, dict) else {})


def refusal_error(status: int, message: str, shape: Mapping[str, Any]) -> EnginePluginError:
    """The exception for an error that llama.cpp reported, before or inside a stream."""
    if shape.get("type") == "exceed_context_size_error":
        message += ". Shorten the request, or raise engine.context_length in plugin.yaml"
    if _TOO_LARGE in message:  # a 500, and its advice is not for our user
        message = f"{message.partition('. ')[0]}. Shorten it; the model, or engine.context_length, allows no more"
        status = 400
    if 400 <= status < 500 and status not in (401, 403, 404):
        return InvalidRequestError(f"request_data: the engine refuses it: {message}")
    if status == 501:
        return UnsupportedError(f"the engine does not support this: {message}")
    if status == 503:
        return UnavailableError(f"the engine has no room now: {message}")
    return BadGatewayError(f"the engine answered {status}: {message}")
