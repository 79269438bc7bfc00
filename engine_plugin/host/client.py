"""PluginClient: one method for each rpc of a plugin, and the termination of its process."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

from engine_plugin.errors import BadGatewayError, EnginePluginError, PullError
from engine_plugin.host.generic import call_json
from engine_plugin.host.streams import BidiCall, ChunkStream, StreamedCall
from engine_plugin.jsontext import answer_object
from engine_plugin.protocol.shapes import EngineCheck, OperateStatus
from engine_plugin.protocol.stubs import provider_pb2 as pb
from engine_plugin.protocol.stubs.goplugin import controller_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from engine_plugin.host.link import Link
    from engine_plugin.protocol.shapes import EngineConfig, ModelEntry, PullOptions, PullProgress

__all__ = ["EXIT_TIMEOUT", "SHUTDOWN_TIMEOUT", "PluginClient"]

# As in go-plugin: two seconds for the Shutdown rpc, two more for the exit. Tests set them.
SHUTDOWN_TIMEOUT = 2.0
EXIT_TIMEOUT = 2.0


class PluginClient:
    """A running plugin. Created by `launch` or `connect`; leaving its context kills the plugin.

    Every method takes `timeout` in seconds; with None the plugin's own bounds apply, those of its plugin.yaml.
    Methods raise the classes of `engine_plugin.errors`: the class of the response's code if the plugin returns an
    error, DeadlineError after `timeout`, UnavailableError if the connection is lost, and PluginProcessError if the
    plugin's process has died.
    """

    def __init__(self, link: Link, background: Sequence[asyncio.Task[None]] = ()) -> None:
        self._link = link
        self._background = background
        self._killing: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The plugin's name; for a client of `connect` its address."""
        return self._link.name

    @property
    def address(self) -> str:
        """The gRPC target."""
        return self._link.address

    @property
    def pid(self) -> int | None:
        """The process id of a launched plugin, None for a client of `connect`."""
        return self._link.process.pid if self._link.process else None

    @property
    def returncode(self) -> int | None:
        """The exit status of a launched plugin, None while it runs."""
        return self._link.process.returncode if self._link.process else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.kill()

    # The process.

    async def kill(self) -> None:
        """Request a shutdown, wait two seconds for the exit, then kill the process and reap it. Idempotent.

        Pending calls raise PluginProcessError. For a client of `connect`, only the connection is closed; the plugin
        keeps running.
        """
        if self._killing is None:
            self._killing = asyncio.ensure_future(self._kill())
        await asyncio.shield(self._killing)

    async def shutdown(self) -> None:
        """Call go-plugin's GRPCController.Shutdown, which also ends a plugin that was not launched by this client."""
        if not self._link.closed:
            await _shutdown(self._link)

    async def _kill(self) -> None:
        link = self._link
        try:
            if link.process is not None and link.process.returncode is None:
                # It may have no such rpc, or be exiting already; the signal below follows in any case.
                with suppress(EnginePluginError):
                    await _shutdown(link)
        finally:
            link.closed = True
            for task in self._background:
                task.cancel()
            try:
                await asyncio.gather(*self._background, return_exceptions=True)
                await link.channel.close()
            finally:
                if link.process is not None:
                    await link.process.end(EXIT_TIMEOUT)

    # Services.

    async def get_manifest(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return the plugin's manifest as a dict."""
        response = await self._link.unary("GetManifest", timeout)
        return _parse_object(response.manifest_json, "GetManifest")

    async def invoke(
        self, service: str, request: Mapping[str, Any] | bytes, *, timeout: float | None = None, auth: str = ""
    ) -> dict[str, Any]:
        """Call a service once; request and answer are JSON objects in the service's flavor."""
        return _parse_object(await self.invoke_raw(service, request, timeout=timeout, auth=auth), service)

    async def invoke_raw(
        self, service: str, request: Mapping[str, Any] | bytes, *, timeout: float | None = None, auth: str = ""
    ) -> bytes:
        """Call a service once and return the answer as the bytes that the plugin sent."""
        response = await self._link.unary("InvokeService", timeout, **_invocation(service, request, auth))
        return bytes(response.response_data)

    def stream(
        self, service: str, request: Mapping[str, Any] | bytes, *, timeout: float | None = None, auth: str = ""
    ) -> ChunkStream:
        """Call a service and receive its answer in chunks of server-sent events as they arrive.

        An async context manager and iterator of bytes; leaving the context cancels the call.
        """
        return ChunkStream(self._link, timeout, pb.InvokeServiceRequest(**_invocation(service, request, auth)))

    def invoke_bidi(self, service: str, *, timeout: float | None = None, auth: str = "") -> BidiCall:
        """Begin a conversation with a service (speech-to-text-ws)."""
        return BidiCall(self._link, timeout, service, auth)

    def call_json(
        self,
        rpc: str,
        request: Mapping[str, Any] | Sequence[Mapping[str, Any]] = MappingProxyType({}),
        *,
        timeout: float | None = None,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Call any rpc by its name (`GetManifest` or `get_manifest`) and yield each message of its answer.

        `request` holds the fields of the request message, or the content of its `request_json`; for InvokeServiceBidi
        it is a sequence of messages. Bytes fields hold JSON or text in both directions. The caller checks `code`.
        Raises InvalidRequestError for a request that does not match the rpc.
        """
        return call_json(self._link, rpc, request, timeout)

    # Status and keys.

    async def health_check(self, *, timeout: float | None = None) -> str:
        """Return the health message of the engine. Raises UnavailableError if it cannot serve."""
        return str((await self._link.unary("HealthCheck", timeout)).message)

    async def get_operate_status(self, *, timeout: float | None = None) -> OperateStatus:
        """Return the state of the engine: stopped, running or failed."""
        response = await self._link.unary("GetOperateStatus", timeout)
        return OperateStatus(response.status)

    async def set_operate_status(self, status: OperateStatus, *, timeout: float | None = None) -> None:
        """Set the status that GetOperateStatus returns."""
        await self._link.unary("SetOperateStatus", timeout, status=status)

    async def set_auth(self, auth_type: str, credentials: Mapping[str, str], *, timeout: float | None = None) -> None:
        """Set the credentials of a remote provider."""
        await self._link.unary("SetAuth", timeout, auth_type=auth_type, credentials=credentials)

    async def validate_auth(self, *, timeout: float | None = None) -> None:
        """Check the credentials. Raises AuthError."""
        await self._link.unary("ValidateAuth", timeout)

    async def refresh_auth(self, *, timeout: float | None = None) -> None:
        """Renew the credentials. Raises AuthError."""
        await self._link.unary("RefreshAuth", timeout)

    # The engine.

    async def start_engine(self, mode: str = "auto", *, timeout: float | None = None) -> None:
        """Start the engine and return when it is ready; `mode` is auto, cpu, gpu or npu."""
        await self._link.unary("StartEngine", timeout, mode=mode)

    async def stop_engine(self, *, timeout: float | None = None) -> None:
        """Stop the engine; the plugin keeps running."""
        await self._link.unary("StopEngine", timeout)

    async def get_config(self, *, timeout: float | None = None) -> EngineConfig:
        """Return the location of the engine and its recommended model."""
        response = await self._link.unary("GetConfig", timeout)
        return cast("EngineConfig", _parse_object(response.config_json, "GetConfig"))

    async def check_engine(self, *, timeout: float | None = None) -> EngineCheck:
        """Check whether the engine's software is installed; the result is true or false and has a `detail`."""
        response = await self._link.unary("CheckEngine", timeout)
        return EngineCheck(response.installed, response.message)

    async def install_engine(self, *, cover: bool = False, timeout: float | None = None) -> str:
        """Install the engine's software and return the plugin's message; `cover` reinstalls it."""
        return str((await self._link.unary("InstallEngine", timeout, cover=cover)).message)

    async def init_env(self, *, timeout: float | None = None) -> None:
        """Prepare what the engine needs to start."""
        await self._link.unary("InitEnv", timeout)

    async def upgrade_engine(self, *, timeout: float | None = None) -> str:
        """Upgrade the engine's software to the version in the manifest and return the plugin's message."""
        return str((await self._link.unary("UpgradeEngine", timeout)).message)

    async def get_version(self, *, timeout: float | None = None) -> str:
        """Return the version of the engine."""
        response = await self._link.unary("GetVersion", timeout, request_json=b"{}")
        return str(_parse_object(response.response_json, "GetVersion").get("version", ""))

    # Models.

    async def pull_model(
        self, model: str, *, timeout: float | None = None, **options: Unpack[PullOptions]
    ) -> PullProgress:
        """Pull a model and return the last progress, whose status is "success". Raises PullError."""
        request = _dump(model=model, stream=False, **options)
        last = _progress((await self._link.unary("PullModel", timeout, request_json=request)).response_json)
        if last.get("status") != "success":
            raise PullError(f"the pull of {model} ended with {last.get('status')!r}")
        return last

    async def pull_model_stream(
        self, model: str, *, timeout: float | None = None, **options: Unpack[PullOptions]
    ) -> AsyncGenerator[PullProgress, None]:
        """Pull a model and yield its progress; the last one has status "success". Options as for `pull_model`.

        Closing the iterator (`contextlib.aclosing`) ends the pull; the next pull resumes it.
        """
        request = pb.PullModelStreamRequest(request_json=_dump(model=model, stream=True, **options))
        async with StreamedCall(self._link, "PullModelStream", timeout, request) as call:
            async for response in call:
                step = _progress(response.data)
                if "error" in step:  # a message with the code follows
                    continue
                yield step
                if step.get("status") == "success":
                    return
        raise PullError(f"the plugin ended the pull of {model} before it was complete; pull again to resume")

    async def delete_model(self, model: str, *, timeout: float | None = None) -> None:
        """Delete a model from this machine."""
        await self._link.unary("DeleteModel", timeout, request_json=_dump(model=model))

    async def list_models(self, *, timeout: float | None = None) -> list[ModelEntry]:
        """Return the models that a call can name."""
        response = await self._link.unary("ListModels", timeout)
        return _models(response.response_json, "ListModels")

    async def load_model(self, model: str, *, timeout: float | None = None) -> None:
        """Load a model into memory and return when it can answer."""
        await self._link.unary("LoadModel", timeout, request_json=_dump(model=model))

    async def unload_model(self, *models: str, timeout: float | None = None) -> None:
        """Unload models from memory, after their running requests."""
        await self._link.unary("UnloadModel", timeout, request_json=_dump(models=list(models)))

    async def running_models(self, *, timeout: float | None = None) -> list[ModelEntry]:
        """Return the models in memory."""
        response = await self._link.unary("GetRunningModels", timeout)
        return _models(response.response_json, "GetRunningModels")


async def _shutdown(link: Link) -> None:
    rpc = controller_pb2.DESCRIPTOR.services_by_name["GRPCController"].methods_by_name["Shutdown"]
    await link.answer(link.begin(rpc, controller_pb2.Empty(), timeout=SHUTDOWN_TIMEOUT))


def _dump(**fields: Any) -> bytes:
    """Return the fields as a JSON object."""
    return json.dumps(fields).encode()


def _invocation(service: str, request: Mapping[str, Any] | bytes, auth: str) -> dict[str, Any]:
    """Return the fields of an InvokeServiceRequest; bytes are sent unchanged."""
    data = request if isinstance(request, bytes) else _dump(**request)
    return {"service_name": service, "request_data": data, "auth_info": auth}


def _parse_object(data: bytes, of: str) -> dict[str, Any]:
    """Parse a JSON object in the answer to `of`. Raises BadGatewayError."""
    return answer_object(data, f"the plugin's answer to {of}")


def _models(data: bytes, of: str) -> list[ModelEntry]:
    """Return the models of a ListModelsResponse. Raises BadGatewayError."""
    found = _parse_object(data, of).get("models") or []
    if not isinstance(found, list):
        raise BadGatewayError(f"the plugin's answer to {of} has no list of models: {data[:200]!r}")
    return cast("list[ModelEntry]", found)


def _progress(data: bytes) -> PullProgress:
    """Parse a ProgressResponse. Raises BadGatewayError."""
    return cast("PullProgress", _parse_object(data, "PullModel"))
