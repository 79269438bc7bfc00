"""ProviderService over `Plugin`: converts protobuf and JSON, and errors to codes.

An ordinary failure is an OK gRPC status with `code` and `message` in the body; only a deadline that passes inside a
stream ends with another gRPC status (the contract of the AOG plugin SDK).
"""

from __future__ import annotations

import asyncio
import errno
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from google.protobuf.message_factory import GetMessageClass

from engine_plugin import catalogue
from engine_plugin.download.disk import disk_reason
from engine_plugin.errors import (
    DeadlineError,
    EnginePluginError,
    InvalidRequestError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.jsontext import write_json
from engine_plugin.messages import ConversationMessage
from engine_plugin.protocol.shapes import EngineConfig
from engine_plugin.protocol.stubs import provider_pb2 as pb
from engine_plugin.redaction import sendable
from engine_plugin.rpc.status import GrpcStatus
from engine_plugin.server.hosts import Host
from engine_plugin.server.payloads import model_name, model_names, pull_request
from engine_plugin.server.seam import HostGone, RpcError, RpcService
from engine_plugin.system.limits import NO_FILES, files_in_use

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from google.protobuf.message import Message

    from engine_plugin.models.store import ModelInfo
    from engine_plugin.plugin import Plugin
    from engine_plugin.server.seam import Call

__all__ = ["OK", "ProviderServicer", "provider_service"]

log = logging.getLogger(__name__)

OK = 200

_REFUSALS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""A read-only or full file system, or one without permission: no fault of the plugin, so no traceback is logged."""


_SERVICE = pb.DESCRIPTOR.services_by_name["ProviderService"]


def provider_service(plugin: Plugin, host: Host | None = None) -> RpcService:
    """ProviderService for an RpcServer, with what `host` needs beyond the contract."""
    return RpcService(_SERVICE, ProviderServicer(plugin, host or Host()))


def _unary(
    work: Callable[[ProviderServicer, Any], Awaitable[dict[str, Any] | None]],
) -> Callable[[ProviderServicer, Any, Call], Awaitable[Any]]:
    """A unary rpc: `work` returns the response's fields beside code and message (or `message` itself), or raises.

    A failure that the host cannot handle has code 0 and keeps its message.
    """
    rpc = work.__name__
    response = GetMessageClass(_SERVICE.methods_by_name[rpc].output_type)

    async def answer(self: ProviderServicer, request: Any, call: Call) -> Message:
        return await self._answer(rpc, response, call, work(self, request))

    return answer


def _error_fields(failure: EnginePluginError) -> dict[str, Any]:
    """The fields of a response that describe the error."""
    return {"code": failure.code, "message": failure.message}


def _models(models: Sequence[ModelInfo]) -> dict[str, Any]:
    return {"response_json": write_json({"models": [model.to_wire() for model in models]})}


_LEAVE_TAKING = 2.0
"""Seconds that a host which is still sending has to read why its conversation failed."""


class ProviderServicer:
    """The 25 methods, each named as its rpc."""

    def __init__(self, plugin: Plugin, host: Host) -> None:
        self._plugin = plugin
        self._host = host
        self._unavailable: dict[str, str] = {}
        """The last message of each rpc that found the engine unavailable; removed when it succeeds."""

    @_unary
    async def GetManifest(self, _request: pb.GetManifestRequest) -> dict[str, Any]:
        return {"manifest_json": await self._plugin.manifest_json()}

    # Services

    @_unary
    async def InvokeService(self, request: pb.InvokeServiceRequest) -> dict[str, Any]:
        answer = await self._plugin.invoke(request.service_name, request.request_data)
        return {"response_data": self._host.answer(request.service_name, answer)}

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
            raise RpcError.of(GrpcStatus.DEADLINE_EXCEEDED, self._placed(error)) from error
        except (Exception, asyncio.CancelledError) as error:  # the edge, as in _answer
            failure = self._failure(error, "InvokeServiceStream")
            call.end_with(failure.metadata)
            await call.send(response(**_error_fields(failure), metadata=failure.metadata, is_final=True))
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
            raise RpcError.of(GrpcStatus.DEADLINE_EXCEEDED, self._placed(error)) from error
        except RpcError:  # the bytes are not a valid message
            raise
        except (Exception, asyncio.CancelledError) as error:  # the edge, as in _answer
            failure = self._failure(error, "InvokeServiceBidi")
            call.end_with(failure.metadata)
            await call.send(response(**_error_fields(failure), metadata=failure.metadata))
            if not all_heard.is_set():
                # The host's writes fail once the call has ended, and some gRPC clients then drop what they have not
                # read: this error. A host that has read it leaves, which ends the wait.
                await asyncio.sleep(_LEAVE_TAKING)

    # Health and status

    @_unary
    async def HealthCheck(self, _request: pb.HealthCheckRequest) -> dict[str, Any]:
        health = await self._plugin.health()
        return {"message": f"{health.state.value}: {health.detail}"}

    async def GetOperateStatus(
        self, _request: pb.GetOperateStatusRequest, _call: Call
    ) -> pb.GetOperateStatusResponse:
        return pb.GetOperateStatusResponse(status=self._plugin.status)

    async def SetOperateStatus(self, request: pb.SetOperateStatusRequest, _call: Call) -> pb.SetOperateStatusResponse:
        try:
            self._plugin.set_status(request.status)
        except InvalidRequestError as error:  # this response has no code field
            raise RpcError.of(GrpcStatus.INVALID_ARGUMENT, self._placed(error)) from error
        return pb.SetOperateStatusResponse()

    # Authentication: only plugins of remote providers have any

    @_unary
    async def SetAuth(self, _request: pb.SetAuthRequest) -> None:
        self._refuse_auth()

    @_unary
    async def ValidateAuth(self, _request: pb.ValidateAuthRequest) -> None:
        self._refuse_auth()

    @_unary
    async def RefreshAuth(self, _request: pb.RefreshAuthRequest) -> None:
        self._refuse_auth()

    def _refuse_auth(self) -> NoReturn:
        name = self._plugin.manifest.provider.name
        raise UnsupportedError(f"{name} runs a local engine, which needs no authentication; only remote plugins do")

    # The engine's state and software

    @_unary
    async def StartEngine(self, request: pb.StartEngineRequest) -> None:
        await self._plugin.start(request.mode)

    @_unary
    async def StopEngine(self, _request: pb.StopEngineRequest) -> None:
        await self._plugin.stop()

    @_unary
    async def GetConfig(self, _request: pb.GetConfigRequest) -> dict[str, Any]:
        return {
            "config_json": write_json({**dict.fromkeys(EngineConfig.__annotations__, ""), **self._plugin.config()})
        }

    @_unary
    async def CheckEngine(self, _request: pb.CheckEngineRequest) -> dict[str, Any]:
        check = await self._plugin.check()
        return {"installed": check.installed, "message": check.detail}

    @_unary
    async def InstallEngine(self, request: pb.InstallEngineRequest) -> dict[str, Any]:
        return {"message": await self._plugin.install(cover=request.cover)}

    @_unary
    async def InitEnv(self, _request: pb.InitEnvRequest) -> None:
        await self._plugin.init_env()

    @_unary
    async def UpgradeEngine(self, _request: pb.UpgradeEngineRequest) -> dict[str, Any]:
        return {"message": await self._plugin.upgrade()}

    @_unary
    async def GetVersion(self, _request: pb.GetVersionRequest) -> dict[str, Any]:
        return {"response_json": write_json({"version": await self._plugin.version()})}

    # Models

    @_unary
    async def PullModel(self, request: pb.PullModelRequest) -> dict[str, Any]:
        from engine_plugin.download.events import Success, progress_json  # here, for a quick start

        wanted = pull_request(request.request_json)
        async with self._plugin.pull_model(wanted) as events:
            async for event in events:
                if isinstance(event, Success):
                    return {"response_json": progress_json(event)}
        raise EnginePluginError("the pull ended without a result")

    async def PullModelStream(self, request: pb.PullModelStreamRequest, call: Call) -> None:
        from engine_plugin.download.events import Error, progress_json

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
            fields = _error_fields(failure)
            await call.send(
                response(data=write_json({"error": fields["message"]}))
            )  # for a host that reads only data
            await asyncio.sleep(self._host.last_pause)
            await call.send(response(**fields, data=progress_json(Error(fields["message"], failure.code))))

    @_unary
    async def DeleteModel(self, request: pb.DeleteModelRequest) -> None:
        await self._plugin.delete_model(model_name(request.request_json))

    @_unary
    async def ListModels(self, _request: pb.ListModelsRequest) -> dict[str, Any]:
        return _models(self._host.listed(await self._plugin.list_models()))

    @_unary
    async def LoadModel(self, request: pb.LoadModelRequest) -> None:
        await self._plugin.load_model(model_name(request.request_json))

    @_unary
    async def UnloadModel(self, request: pb.UnloadModelRequest) -> None:
        names = model_names(request.request_json)
        # The answer comes when every model is unloaded or has failed; the first failure is reported, those that
        # the host does not handle last.
        ends = await asyncio.gather(*map(self._plugin.unload_model, names), return_exceptions=True)
        for failed in sorted(filter(None, ends), key=lambda end: self._host.tolerates("UnloadModel", end)):
            raise failed

    @_unary
    async def GetRunningModels(self, _request: pb.GetRunningModelsRequest) -> dict[str, Any]:
        return _models(await self._plugin.running_models())

    # How every rpc ends

    async def _answer(
        self, rpc: str, response: type[Message], call: Call, work: Awaitable[dict[str, Any] | None]
    ) -> Message:
        try:
            fields = await work or {}
        # The outermost handler: the plugin answers and goes on, whatever was raised.
        except (Exception, asyncio.CancelledError) as error:
            failure = self._failure(error, rpc)
            if self._host.tolerates(rpc, error):
                log.warning("%s failed; %s gets code 0, since it cannot handle a failure here", rpc, self._host.name)
                return response(message=failure.message)
            call.end_with(failure.metadata)
            return response(**_error_fields(failure))
        self._unavailable.pop(rpc, None)
        message = sendable(fields.pop("message")) if "message" in fields else "ok"
        return response(code=OK, message=message, **fields)

    def _refusal(self, error: EnginePluginError, where: str) -> None:
        message = error.message
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


async def _messages(
    first: pb.InvokeServiceBidiRequest, call: Call, all_heard: asyncio.Event, silence: float | None
) -> AsyncIterator[ConversationMessage]:
    """The host's messages, `first` included, until its half-close, which sets `all_heard`, or too long a silence."""
    message: Any = first
    while message is not None:
        yield ConversationMessage(message.data, message.message_type, dict(message.metadata))
        try:
            async with asyncio.timeout(silence):
                message = await call.receive()
        except TimeoutError:
            log.info("a conversation ends after %g s without a message", silence)
            message = None
    all_heard.set()
