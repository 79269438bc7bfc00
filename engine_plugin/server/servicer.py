"""ProviderService over `Plugin`: converts protobuf and JSON, and errors to codes.

An ordinary failure is an OK gRPC status with `code` and `message` in the body; only a deadline that passes inside a
stream ends with another gRPC status (the contract of the AOG plugin SDK).
"""

from __future__ import annotations

import asyncio
import errno
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message

from engine_plugin import catalogue
from engine_plugin.download.disk import disk_reason
from engine_plugin.download.events import Error, Success, progress_json
from engine_plugin.errors import (
    DeadlineError,
    EnginePluginError,
    InvalidRequestError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.jsontext import write_json
from engine_plugin.messages import BidiMessage
from engine_plugin.protocol.shapes import EngineConfig
from engine_plugin.protocol.stubs import provider_pb2 as pb
from engine_plugin.redaction import redacted
from engine_plugin.server.hosts import Host
from engine_plugin.server.payloads import model_name, model_names, pull_request
from engine_plugin.server.seam import HostGone, RpcError, Status, bind
from engine_plugin.system.limits import NO_FILES, files_in_use

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from engine_plugin.models.store import ModelInfo
    from engine_plugin.plugin import Plugin
    from engine_plugin.server.seam import Call, RpcService

__all__ = ["OK", "ProviderServicer", "provider_service"]

log = logging.getLogger(__name__)

Response = TypeVar("Response", bound=Message)

OK = 200

_REFUSALS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""A read-only or full file system, or one without permission: no fault of the plugin, so no traceback is logged."""


def provider_service(plugin: Plugin, host: Host | None = None) -> RpcService:
    """ProviderService for an RpcServer, with what `host` needs beyond the contract."""
    return bind(pb.DESCRIPTOR.services_by_name["ProviderService"], ProviderServicer(plugin, host or Host()))


def _sendable(text: str) -> str:
    """`text` without secrets, and as valid UTF-8: it may quote a path in an unknown encoding."""
    return redacted(text).encode("utf-8", "replace").decode()


def _told(failure: EnginePluginError) -> dict[str, Any]:
    """The fields of a response that describe the error."""
    return {"code": failure.code, "message": _sendable(failure.message)}


def _dump(shape: Any) -> bytes:
    return write_json(shape)


def _models(models: Sequence[ModelInfo]) -> dict[str, Any]:
    return {"response_json": _dump({"models": [model.to_wire() for model in models]})}


_LEAVE_TAKING = 2.0
"""Seconds that a host which is still sending has to read why its conversation failed."""


class ProviderServicer:
    """The 25 methods, each named as its rpc."""

    def __init__(self, plugin: Plugin, host: Host) -> None:
        self._plugin = plugin
        self._host = host
        self._unavailable: dict[str, str] = {}
        """The last message of each rpc that found the engine unavailable; removed when it succeeds."""

    async def GetManifest(self, _request: pb.GetManifestRequest, call: Call) -> pb.GetManifestResponse:
        async def work() -> dict[str, Any]:
            return {"manifest_json": await self._plugin.manifest_json()}

        return await self._answer(pb.GetManifestResponse, "GetManifest", call, work)

    # Services

    async def InvokeService(self, request: pb.InvokeServiceRequest, call: Call) -> pb.InvokeServiceResponse:
        async def work() -> dict[str, Any]:
            answer = await self._plugin.invoke(request.service_name, request.request_data)
            return {"response_data": self._host.answer(request.service_name, answer)}

        return await self._answer(pb.InvokeServiceResponse, "InvokeService", call, work)

    async def InvokeServiceStream(self, request: pb.InvokeServiceRequest, call: Call) -> None:
        response = pb.InvokeServiceStreamResponse
        try:
            async with self._plugin.stream(request.service_name, request.request_data) as chunks:
                # While `send` waits for a slow host, nothing is read from the engine; what arrives meanwhile
                # leaves together in the next chunk.
                async for chunk in chunks:
                    if events := self._host.events(request.service_name, chunk):
                        await call.send(response(code=OK, chunk_data=events))
        except DeadlineError as error:
            raise self._ended(Status.DEADLINE_EXCEEDED, error) from error
        except (Exception, asyncio.CancelledError) as error:  # the edge, as in _answer
            failure = self._failure(error, "InvokeServiceStream")
            call.end_with(failure.metadata)
            await call.send(response(**_told(failure), metadata=failure.metadata, is_final=True))
        else:
            self._unavailable.pop("InvokeServiceStream", None)
            await call.send(response(code=OK, is_final=True))

    async def InvokeServiceBidi(self, call: Call) -> None:
        response = pb.InvokeServiceBidiResponse
        all_heard = asyncio.Event()
        try:
            first = await call.receive()
            if not isinstance(first, pb.InvokeServiceBidiRequest):
                raise InvalidRequestError.at("service_name", "the conversation ended before its first message")
            messages = _messages(first, call, all_heard, self._host.silence)
            async with self._plugin.converse(first.service_name, messages) as answers:
                async for answer in answers:
                    if not self._host.takes(first.service_name, answer.data):
                        continue
                    await call.send(
                        response(
                            code=OK,
                            data=answer.data,
                            message_type=answer.message_type,
                            metadata=answer.metadata,
                        )
                    )
        except DeadlineError as error:
            raise self._ended(Status.DEADLINE_EXCEEDED, error) from error
        except RpcError:  # the bytes are not a valid message
            raise
        except (Exception, asyncio.CancelledError) as error:  # the edge, as in _answer
            failure = self._failure(error, "InvokeServiceBidi")
            call.end_with(failure.metadata)
            await call.send(response(**_told(failure), metadata=failure.metadata))
            if not all_heard.is_set():
                # The host's writes fail once the call has ended, and some gRPC clients then drop what they have not
                # read: this error. A host that has read it leaves, which ends the wait.
                await asyncio.sleep(_LEAVE_TAKING)

    # Health and status

    async def HealthCheck(self, _request: pb.HealthCheckRequest, call: Call) -> pb.HealthCheckResponse:
        async def work() -> dict[str, Any]:
            health = await self._plugin.health()
            return {"message": f"{health.state.value}: {health.detail}"}

        return await self._answer(pb.HealthCheckResponse, "HealthCheck", call, work)

    async def GetOperateStatus(
        self, _request: pb.GetOperateStatusRequest, _call: Call
    ) -> pb.GetOperateStatusResponse:
        return pb.GetOperateStatusResponse(status=self._plugin.status)

    async def SetOperateStatus(self, request: pb.SetOperateStatusRequest, _call: Call) -> pb.SetOperateStatusResponse:
        try:
            self._plugin.set_status(request.status)
        except InvalidRequestError as error:  # this response has no code field
            raise self._ended(Status.INVALID_ARGUMENT, error) from error
        return pb.SetOperateStatusResponse()

    # Authentication: only plugins of remote providers have any

    async def SetAuth(self, _request: pb.SetAuthRequest, call: Call) -> pb.SetAuthResponse:
        return await self._answer(pb.SetAuthResponse, "SetAuth", call, self._no_auth)

    async def ValidateAuth(self, _request: pb.ValidateAuthRequest, call: Call) -> pb.ValidateAuthResponse:
        return await self._answer(pb.ValidateAuthResponse, "ValidateAuth", call, self._no_auth)

    async def RefreshAuth(self, _request: pb.RefreshAuthRequest, call: Call) -> pb.RefreshAuthResponse:
        return await self._answer(pb.RefreshAuthResponse, "RefreshAuth", call, self._no_auth)

    async def _no_auth(self) -> None:
        name = self._plugin.manifest.provider.name
        raise UnsupportedError(f"{name} runs a local engine, which needs no authentication; only remote plugins do")

    # The engine's state and software

    async def StartEngine(self, request: pb.StartEngineRequest, call: Call) -> pb.StartEngineResponse:
        return await self._answer(
            pb.StartEngineResponse, "StartEngine", call, lambda: self._plugin.start(request.mode)
        )

    async def StopEngine(self, _request: pb.StopEngineRequest, call: Call) -> pb.StopEngineResponse:
        return await self._answer(pb.StopEngineResponse, "StopEngine", call, self._plugin.stop)

    async def GetConfig(self, _request: pb.GetConfigRequest, call: Call) -> pb.GetConfigResponse:
        async def work() -> dict[str, Any]:
            return {
                "config_json": _dump({**dict.fromkeys(EngineConfig.__annotations__, ""), **self._plugin.config()})
            }

        return await self._answer(pb.GetConfigResponse, "GetConfig", call, work)

    async def CheckEngine(self, _request: pb.CheckEngineRequest, call: Call) -> pb.CheckEngineResponse:
        async def work() -> dict[str, Any]:
            check = await self._plugin.check()
            return {"installed": check.installed, "message": check.detail}

        return await self._answer(pb.CheckEngineResponse, "CheckEngine", call, work)

    async def InstallEngine(self, request: pb.InstallEngineRequest, call: Call) -> pb.InstallEngineResponse:
        async def work() -> dict[str, Any]:
            return {"message": await self._plugin.install(cover=request.cover)}

        return await self._answer(pb.InstallEngineResponse, "InstallEngine", call, work)

    async def InitEnv(self, _request: pb.InitEnvRequest, call: Call) -> pb.InitEnvResponse:
        return await self._answer(pb.InitEnvResponse, "InitEnv", call, self._plugin.init_env)

    async def UpgradeEngine(self, _request: pb.UpgradeEngineRequest, call: Call) -> pb.UpgradeEngineResponse:
        async def work() -> dict[str, Any]:
            return {"message": await self._plugin.upgrade()}

        return await self._answer(pb.UpgradeEngineResponse, "UpgradeEngine", call, work)

    async def GetVersion(self, _request: pb.GetVersionRequest, call: Call) -> pb.GetVersionResponse:
        async def work() -> dict[str, Any]:
            return {"response_json": _dump({"version": await self._plugin.version()})}

        return await self._answer(pb.GetVersionResponse, "GetVersion", call, work)

    # Models

    async def PullModel(self, request: pb.PullModelRequest, call: Call) -> pb.PullModelResponse:
        async def work() -> dict[str, Any]:
            wanted = pull_request(request.request_json)
            async with self._plugin.pull_model(wanted) as events:
                async for event in events:
                    if isinstance(event, Success):
                        return {"response_json": progress_json(event)}
            raise EnginePluginError("the pull ended without a result")

        return await self._answer(pb.PullModelResponse, "PullModel", call, work)

    async def PullModelStream(self, request: pb.PullModelStreamRequest, call: Call) -> None:
        response = pb.PullModelStreamResponse
        try:
            wanted = pull_request(request.request_json)
            async with self._plugin.pull_model(wanted) as events:
                async for event in events:
                    await call.send(response(code=OK, data=progress_json(event)))
            await asyncio.sleep(self._host.last_pause)
        except (Exception, asyncio.CancelledError) as error:  # the edge, as in _answer
            failure = self._failure(error, "PullModelStream")
            call.end_with(failure.metadata)
            told = _told(failure)
            await call.send(response(data=_dump({"error": told["message"]})))  # for a host that reads only data
            await asyncio.sleep(self._host.last_pause)
            await call.send(response(**told, data=progress_json(Error(told["message"], failure.code))))

    async def DeleteModel(self, request: pb.DeleteModelRequest, call: Call) -> pb.DeleteModelResponse:
        async def work() -> None:
            await self._plugin.delete_model(model_name(request.request_json))

        return await self._answer(pb.DeleteModelResponse, "DeleteModel", call, work)

    async def ListModels(self, _request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        async def work() -> dict[str, Any]:
            return _models(self._host.listed(await self._plugin.list_models()))

        return await self._answer(pb.ListModelsResponse, "ListModels", call, work)

    async def LoadModel(self, request: pb.LoadModelRequest, call: Call) -> pb.LoadModelResponse:
        async def work() -> None:
            await self._plugin.load_model(model_name(request.request_json))

        return await self._answer(pb.LoadModelResponse, "LoadModel", call, work)

    async def UnloadModel(self, request: pb.UnloadModelRequest, call: Call) -> pb.UnloadModelResponse:
        async def work() -> None:
            names = model_names(request.request_json)
            # The answer comes when every model is unloaded or has failed; the first failure is reported, those that
            # the host does not handle last.
            ends = await asyncio.gather(*map(self._plugin.unload_model, names), return_exceptions=True)
            for failed in sorted(filter(None, ends), key=lambda end: self._host.tolerates("UnloadModel", end)):
                raise failed

        return await self._answer(pb.UnloadModelResponse, "UnloadModel", call, work)

    async def GetRunningModels(self, _request: pb.GetRunningModelsRequest, call: Call) -> pb.GetRunningModelsResponse:
        async def work() -> dict[str, Any]:
            return _models(await self._plugin.running_models())

        return await self._answer(pb.GetRunningModelsResponse, "GetRunningModels", call, work)

    # How every rpc ends

    async def _answer(
        self, response: type[Response], where: str, call: Call, work: Callable[[], Awaitable[dict[str, Any] | None]]
    ) -> Response:
        """Run one unary rpc: `work` returns the response's fields beside code and message (or `message` itself).

        A failure that the host cannot handle has code 0 and keeps its message.
        """
        try:
            fields = await work() or {}
        # The outermost handler: the plugin answers and goes on, whatever was raised.
        except (Exception, asyncio.CancelledError) as error:
            failure = self._failure(error, where)
            if self._host.tolerates(where, error):
                log.warning(
                    "%s failed; %s gets code 0, since it cannot handle a failure here", where, self._host.name
                )
                return response(message=_sendable(failure.message))
            call.end_with(failure.metadata)
            return response(**_told(failure))
        self._unavailable.pop(where, None)
        message = _sendable(fields.pop("message", "ok"))
        return response(code=OK, message=message, **fields)

    def _refusal(self, error: EnginePluginError, where: str) -> None:
        message = _sendable(error.message)
        # Hosts poll a stopped plugin: only a change is logged.
        again = error.code == UnavailableError.code and self._unavailable.get(where) == message
        self._unavailable[where] = message
        level = logging.DEBUG if again else logging.INFO
        log.log(level, "%s: %d %s", where, error.code, message, extra={"rpc": where, "code": error.code})

    def _failure(self, error: BaseException, where: str) -> EnginePluginError:
        """The error that is sent for an exception. Only this function decides that.

        A cancelled call ends without an answer, since its caller has left. But a CancelledError may come from other
        work that this call waited for; its host would then wait for ever.
        """
        if isinstance(error, HostGone):
            raise error
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise error
        if isinstance(error, OSError) and error.errno in NO_FILES:
            error = UnavailableError(files_in_use(error))
        if isinstance(error, EnginePluginError):
            self._refusal(error, where)
            return self._placed(error)
        if isinstance(error, OSError) and error.filename and error.errno in _REFUSALS:
            log.error("%s: %s", where, error, exc_info=error)
            reason = disk_reason(error, Path(error.filename).parent)
            return self._placed(catalogue.DISK_WRITE_REFUSED.error(place=error.filename, reason=reason))
        log.error("%s: unexpected %s", where, type(error).__name__, exc_info=error)
        text = f"{where}: internal error ({type(error).__name__}); the plugin's log has the details"
        return self._placed(EnginePluginError(text))

    def _placed(self, error: EnginePluginError) -> EnginePluginError:
        """The error, with the engine's name in its fields."""
        error.fields.setdefault("engine", self._plugin.manifest.engine_name)
        return error

    def _ended(self, status: Status, error: EnginePluginError) -> RpcError:
        """The gRPC status for an error."""
        return RpcError.of(status, self._placed(error))


async def _messages(
    first: pb.InvokeServiceBidiRequest, call: Call, all_heard: asyncio.Event, silence: float | None
) -> AsyncIterator[BidiMessage]:
    """The host's messages, `first` included, until its half-close, which sets `all_heard`, or too long a silence."""
    message: Any = first
    while message is not None:
        yield BidiMessage(message.data, message.message_type, dict(message.metadata))
        try:
            async with asyncio.timeout(silence):
                message = await call.receive()
        except TimeoutError:
            log.info("a conversation ends after %g s without a message", silence)
            message = None
    all_heard.set()
