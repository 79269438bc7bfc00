"""The server of one loaded model: process, HTTP client and queue."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.engines.llamacpp.abandoned_work import AbandonedWorkDetector
from engine_plugin.engines.llamacpp.models import parse_properties
from engine_plugin.engines.llamacpp.options import served_context
from engine_plugin.engines.llamacpp.software import RUNNER
from engine_plugin.engines.local.admission import Admission
from engine_plugin.engines.local.server import ServerProcess
from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    EngineStartError,
    InvalidRequestError,
    ModelUnusableError,
    UnavailableError,
)
from engine_plugin.process import python
from engine_plugin.process.engine_process import Command
from engine_plugin.process.entry import UNUSABLE
from engine_plugin.templates.jinja import LIMIT, TemplateError
from engine_plugin.templates.renderer import PROGRAM, WITHIN, Renderer
from engine_plugin.transport.answers import ERROR_LIMIT, Complaint, explained

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from engine_plugin.engines.llamacpp.options import LlamaCppOptions
    from engine_plugin.engines.local.server import Place
    from engine_plugin.install.software import Backend
    from engine_plugin.models.info import ModelCapabilities
    from engine_plugin.models.store import StoredModel
    from engine_plugin.templates.jinja import Templates
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["PATHS", "LlamaCppServer", "LlamaServerSettings", "complaint_error", "server_command"]

log = logging.getLogger(__name__)

PATHS = {
    "chat": "/v1/chat/completions",
    "generate": "/v1/completions",
    "embed": "/v1/embeddings",
    "rerank": "/v1/rerank",
}

# Variables by which llama.cpp's server would override the settings.
_FOREIGN_VARIABLES = ("LLAMA_ARG_", "LLAMA_API_KEY", "LLAMA_LOG_", "AIP_MODE", "AIP_HTTP_PORT")

_PROBES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("generate", {"prompt": "a", "max_tokens": 1, "cache_prompt": False}),
    "embed": ("embed", {"input": "a"}),
    "rerank": ("rerank", {"query": "a", "documents": ["a"]}),
}
_UNUSED_PORT = 8080  # of a server with a socket; 0 would have it listen on a port
_PROBE_TIMEOUT = 30.0
_PROPERTIES_TIMEOUT = 2.0
_PROPERTIES_LIMIT = 4 * 1024 * 1024  # including the chat template
_TOO_LARGE = "is too large to process"
_CONTEXT_LENGTH = "engine.context_length in plugin.yaml sets the limit, up to the context length of the model"


@dataclass(frozen=True, slots=True)
class LlamaServerSettings:
    """The settings of one model's server. The runner gets them as JSON by stdin, to keep the key out of argv and the
    environment. `host` is a socket path ending in .sock, or a loopback address with `port`
    (0: any). `pooling` is NONE, MEAN, CLS, LAST, RANK (for a reranker), or "" for the default of the model.
    """

    model: str
    alias: str
    kind: str
    pooling: str
    host: str
    port: int
    key: str
    context_length: int
    parallel: int
    threads: int
    gpu_layers: int


class LlamaCppServer(ServerProcess):
    """A llama.cpp process that serves one model. Owned by the pool; closed once, then discarded."""

    health_path = "/health"
    error_marks = (" E ", "E cannot", "error", "Error")
    _options: LlamaCppOptions

    def __init__(
        self,
        model: StoredModel,
        backend: Backend,
        options: LlamaCppOptions,
        place: Place,
        gpu_layers: int,
        on_capabilities: Callable[[StoredModel, ModelCapabilities], None],
    ) -> None:
        """`on_capabilities` gets the capabilities that the server reports for its model, after each start."""
        self.model = model
        self._gpu_layers = gpu_layers
        self._on_capabilities = on_capabilities
        self._templates: Templates | None = None
        self._renderer: Renderer | None = None
        self._abandoned = AbandonedWorkDetector()
        self.admission = Admission(options.parallel, options.max_queue)
        name = f"llama.cpp for {model.name}"
        super().__init__(name, backend, options, place, serves=model.name, needs=model.size)

    async def ensure_ready(self) -> None:
        """Start the server, sharing a start that is under way.

        Raises ModelUnusableError if llama.cpp cannot load the model, EngineStartError for other reasons.
        """
        try:
            await super().ensure_ready()
        except EngineStartError as error:
            run = self.latest_run
            if run is not None and run.exit_code == UNUSABLE and not run.lacked_memory:
                raise ModelUnusableError(
                    f"{error}. Delete the model and pull it again, or pull another one"
                ) from error
            raise

    @asynccontextmanager
    async def post(self, service: str, body: bytes) -> AsyncIterator[HttpResponse]:
        """Send a request and yield its answer with status 200.

        Raises InvalidRequestError and others for errors of llama.cpp, and BadGatewayError with the last log lines if
        the process exits.
        """
        exchange = self.http().request("POST", PATHS[service], body)
        run = self.latest_run
        try:
            with self._abandoned.exchange() as started:
                async with exchange as response:
                    started.append(True)
                    if response.status != 200:
                        raise complaint_error(Complaint.of_body(response.status, await response.read(ERROR_LIMIT)))
                    yield response
        except (BadGatewayError, UnavailableError) as error:
            if not exchange.broken or run is None:
                raise
            raise await explained(error, run) from error

    async def close(self) -> None:
        self.admission.close()
        try:
            await super().close()
        finally:
            await self.set_templates(None)

    def unusable(self) -> str:
        return super().unusable() or self._abandoned.problem(self.pid)

    def launch(self) -> Command:
        options, details = self._options, self.model.details.extra
        pooling = str(details.get("pooling") or "NONE")
        settings = LlamaServerSettings(
            model=str(self.model.path),
            alias=self.model.name,
            kind=self.model.kind,
            pooling="RANK" if self.model.kind == "rerank" else "MEAN" if pooling in ("NONE", "RANK") else "",
            host=str(self.socket or "127.0.0.1"),
            port=_UNUSED_PORT if self.socket else self.ports[0] if self.ports else 0,
            key=self.key,
            context_length=served_context(self.model, options),
            parallel=options.parallel,
            threads=options.threads,
            gpu_layers=self._gpu_layers,
        )
        env = server_environ(self._environ, self.backend)
        if self.is_ours:
            return Command(python.module_command(RUNNER, "serve"), env, json.dumps(asdict(settings)).encode() + b"\n")
        return Command(server_command(self.backend, settings, self._write_key_file()), env)

    async def prove(self) -> None:
        """Send it a real request, because /health answers 200 before the first computation."""
        service, request = _PROBES[self.model.kind]
        async with asyncio.timeout(_PROBE_TIMEOUT), self.post(service, json.dumps(request).encode()) as response:
            await response.read(ERROR_LIMIT)
        capabilities, templates = parse_properties(await self._properties())
        self._on_capabilities(self.model, capabilities)
        await self.set_templates(templates)

    async def require_renderable(self, body: Mapping[str, Any]) -> None:
        """Raise InvalidRequestError if rendering a chat with the model's template exceeds the limits.

        llama.cpp renders without limits. Other errors are left to llama.cpp, whose renderer differs.
        """
        if self._renderer is None:
            return
        extra = body.get("chat_template_kwargs")
        try:
            await self._renderer.render(
                body["messages"],
                body.get("tools") or [],
                extra if isinstance(extra, dict) else {},
                told=False,
            )
        except TemplateError as error:
            if error.kind == LIMIT:
                raise InvalidRequestError.at(
                    "messages", f"rendering with the model's chat template exceeds a limit: {error}"
                ) from None
        except (ImportError, OSError) as error:
            log.warning("chat templates are not checked before llama.cpp renders them: %s", error)
            await self.set_templates(None)

    async def set_templates(self, templates: Templates | None) -> None:
        """Check chats with these templates from now on; None: with none."""
        if templates is not None and templates == self._templates:
            return  # unchanged since an earlier run
        before, self._renderer, self._templates = self._renderer, None, templates
        if templates is not None and templates.sources and self.model.kind == "chat":
            environ = python.module_environ(self._environ, self.backend.site)
            self._renderer = Renderer(templates, python.module_command(PROGRAM), environ, WITHIN)
        if before is not None:
            await before.aclose()

    async def _properties(self) -> bytes:
        """The server's description of its model; empty when it has none."""
        try:
            async with asyncio.timeout(_PROPERTIES_TIMEOUT), self.http().request("GET", "/props") as response:
                body = await response.read(_PROPERTIES_LIMIT)
                return body if response.status == 200 else b""
        except (EnginePluginError, TimeoutError) as error:
            log.debug("%s does not report its properties: %s", self.model.name, error)
            return b""


def server_command(backend: Backend, settings: LlamaServerSettings, key_file: Path) -> list[str]:
    """argv of a llama-server behind the guard, which reads the key from `key_file`."""
    argv = python.guarded([backend.executable])
    argv += ["--model", settings.model, "--alias", settings.alias, "--api-key-file", str(key_file)]
    argv += ["--host", settings.host, "--port", str(settings.port), "--no-webui", "--offline"]
    argv += ["--ctx-size", str(settings.context_length), "--parallel", str(settings.parallel)]
    argv += ["--kv-unified", "--threads-http", "64", "--cache-ram", "0", "--slots", "--jinja"]
    argv += ["--no-prefill-assistant"]
    if settings.threads:
        argv += ["--threads", str(settings.threads)]
    if settings.gpu_layers >= 0:
        argv += ["--n-gpu-layers", str(settings.gpu_layers)]
    if settings.kind != "chat":
        whole = str(settings.context_length)
        argv += ["--embedding", "--batch-size", whole, "--ubatch-size", whole]
        if settings.pooling:
            argv += ["--pooling", settings.pooling.lower()]
    return argv


def server_environ(environ: Mapping[str, str], backend: Backend) -> dict[str, str]:
    """The environment of the server: `environ` without the settings of llama.cpp."""
    kept = {name: value for name, value in environ.items() if not name.startswith(_FOREIGN_VARIABLES)}
    kept["GGML_NO_BACKTRACE"] = "1"  # an abort must not fork a debugger
    return python.module_environ(kept, backend.site)


def complaint_error(complaint: Complaint) -> EnginePluginError:
    """The exception for an error that llama.cpp reports, before or within a stream."""
    message = complaint.message
    if complaint.shape.get("type") == "exceed_context_size_error":
        return catalogue.CONTEXT_EXCEEDED.error(said=f"{message.rstrip('.')} ({_CONTEXT_LENGTH})")
    if _TOO_LARGE in message:  # a 500 whose advice does not apply to the plugin
        return catalogue.CONTEXT_EXCEEDED.error(said=f"{message.partition('. ')[0]} ({_CONTEXT_LENGTH})")
    return complaint.error()
