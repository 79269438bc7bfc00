"""KServe's gRPC (`inference.GRPCInferenceService`), for callers of the speech models who know no other.

Speech to text: inputs `audio` (a WAV file, or bare 16-bit samples when `params` says `audio_format: pcm`) and
`params` (JSON: language, task, temperature, sample_rate), output `result` (JSON). Text to speech: `text`, `voice`,
`params`, output `audio` (a WAV file). All are BYTES of one element. A stream collects audio until a message without
any, or with the action finish-task, ends it.
"""

from __future__ import annotations

import hmac
import json
import struct
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from engine_plugin.engines.openvino.runner import audio_api, control_api, wav
from engine_plugin.engines.openvino.runner.errors import ApiError, bad_request
from engine_plugin.engines.openvino.runner.requests import BODY_LIMIT
from engine_plugin.engines.openvino.stubs import kserve_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from engine_plugin.engines.openvino.runner.registry import Registry

__all__ = ["serve_grpc"]

_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_OPTIONS = (
    ("grpc.max_receive_message_length", BODY_LIMIT),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),  # else two servers could have one port without an error
)
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_INPUTS = {"speech-to-text": ("audio", "params"), "text-to-speech": ("text", "voice", "params")}
_OUTPUT = {"speech-to-text": "result", "text-to-speech": "audio"}


async def serve_grpc(registry: Registry, key: str, port: int) -> tuple[grpc.aio.Server, str]:
    """Listen on a port of 127.0.0.1. The server, which ends when nobody refers to it, and where. Raises OSError."""
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((_handler(_Service(registry, key)),))
    try:
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
    except RuntimeError as error:  # grpcio raises this for every reason
        raise OSError(f"cannot listen on 127.0.0.1:{port}: {error}") from error
    await server.start()
    return server, f"127.0.0.1:{bound}"


def _handler(service: _Service) -> grpc.GenericRpcHandler:
    unary: dict[str, tuple[type[Any], Callable[[Any], Awaitable[Any]]]] = {
        "ServerLive": (pb.ServerLiveRequest, service.server_live),
        "ServerReady": (pb.ServerReadyRequest, service.server_ready),
        "ModelReady": (pb.ModelReadyRequest, service.model_ready),
        "ServerMetadata": (pb.ServerMetadataRequest, service.server_metadata),
        "ModelMetadata": (pb.ModelMetadataRequest, service.model_metadata),
        "ModelInfer": (pb.ModelInferRequest, service.infer),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            partial(service.serve, name, answer),
            request_deserializer=request.FromString,
            response_serializer=_serialized,
        )
        for name, (request, answer) in unary.items()
    }
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        service.stream, request_deserializer=pb.ModelInferRequest.FromString, response_serializer=_serialized
    )
    return grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers)


def _serialized(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


class _Service:
    def __init__(self, registry: Registry, key: str) -> None:
        self._registry = registry
        self._expected = f"Bearer {key}".encode()

    async def serve(
        self,
        name: str,
        answer: Callable[[Any], Awaitable[Any]],
        request: Any,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> Any:
        """One unary call, with our errors as gRPC's."""
        try:
            if name not in ("ServerLive", "ServerReady"):
                self._authorize(context)
            return await answer(request)
        except ApiError as error:
            await context.abort(_STATUS.get(error.status, grpc.StatusCode.INTERNAL), error.message)

    def _authorize(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        if not hmac.compare_digest(given if isinstance(given, bytes) else given.encode(), self._expected):
            raise ApiError(401, "authorization: the server's key is needed")

    async def server_live(self, _request: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, _request: Any) -> Any:
        return pb.ServerReadyResponse(ready=self._registry.healthy)

    async def model_ready(self, request: Any) -> Any:
        return pb.ModelReadyResponse(ready=control_api.is_ready(self._registry, request.name))

    async def server_metadata(self, _request: Any) -> Any:
        return pb.ServerMetadataResponse(name=control_api.SERVER_NAME, version=control_api.version())

    async def model_metadata(self, request: Any) -> Any:
        kind = self._kind(request.name)

        def tensor(name: str) -> Any:
            return pb.ModelMetadataResponse.TensorMetadata(name=name, datatype="BYTES", shape=[1])

        return pb.ModelMetadataResponse(
            name=request.name,
            versions=["1"],
            platform="OpenVINO",
            inputs=[tensor(name) for name in _INPUTS[kind]],
            outputs=[tensor(_OUTPUT[kind])],
        )

    def _kind(self, name: str) -> str:
        model = self._registry.models.get(name)
        if model is None:
            raise ApiError(404, f"model: {name} is not served")
        kind = model.graph.kind if model.graph is not None else ""
        if kind not in _INPUTS:
            raise ApiError(400, f"model: {name} does no speech; it is reached over HTTP")
        return kind

    async def infer(self, request: Any) -> Any:
        """ModelInfer."""
        kind = self._kind(request.model_name)
        inputs = _inputs(request)
        params = _params(inputs)
        if kind == "speech-to-text":
            if "audio" not in inputs:
                raise bad_request("audio", "is missing")
            answer = await self._transcribe(request.model_name, inputs["audio"], params)
            data = json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace")
        else:
            if inputs.get("voice"):
                params["voice"] = inputs["voice"].decode("utf-8", "replace")
            text = inputs.get("text", b"").decode("utf-8", "replace")
            data = await audio_api.say(self._registry, request.model_name, text, params)
        return _response(request, _OUTPUT[kind], data)

    async def _transcribe(self, name: str, audio: bytes, params: dict[str, Any]) -> dict[str, Any]:
        if str(params.get("audio_format", "wav")).lower() in ("pcm", "raw"):
            rate = params.get("sample_rate", wav.RATE)
            if not isinstance(rate, int) or isinstance(rate, bool) or rate not in wav.RATES:
                raise bad_request("params.sample_rate", f"must be a rate of samples a second, not {rate!r}")
            audio = wav.with_header(audio, rate)
        return await audio_api.transcribe(self._registry, name, audio, params)

    async def stream(
        self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        """ModelStreamInfer: one conversation, whose result comes at its end."""
        try:
            self._authorize(context)
            yield await self._listen(requests)
        except ApiError as error:
            if error.status == 401:
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.message)
            yield pb.ModelStreamInferResponse(error_message=error.message)
        except Exception as error:  # noqa: BLE001  # the edge that catches all
            traceback.print_exc()
            yield pb.ModelStreamInferResponse(error_message=f"{type(error).__name__}: {error}")

    async def _listen(self, requests: AsyncIterator[Any]) -> Any:
        audio = bytearray()
        params: dict[str, Any] = {}
        last = pb.ModelInferRequest()
        async for request in requests:
            last = request
            inputs = _inputs(request)
            params |= _params(inputs)
            audio += inputs.get("audio", b"")
            if len(audio) > BODY_LIMIT:
                raise ApiError(413, f"audio: more than {BODY_LIMIT} bytes")
            if not any(inputs.values()) or params.get("action") == "finish-task":
                break
        name = str(params.get("model") or last.model_name)
        answer = await self._transcribe(name, bytes(audio), params)
        result = {"status": "success", "content": answer["text"], "is_final": True}
        result |= {"current_chunks": 1, "total_chunks": 1, "segments": answer["segments"]}
        data = json.dumps(result, ensure_ascii=False).encode("utf-8", "replace")
        return pb.ModelStreamInferResponse(infer_response=_response(last, "result", data))


def _inputs(request: Any) -> dict[str, bytes]:
    """The inputs by name, wherever their bytes are."""
    found: dict[str, bytes] = {}
    for place, tensor in enumerate(request.inputs):
        if place < len(request.raw_input_contents):
            found[tensor.name] = _unwrapped(request.raw_input_contents[place])
        elif tensor.contents.bytes_contents:
            found[tensor.name] = tensor.contents.bytes_contents[0]
        else:
            found[tensor.name] = b""
    return found


def _unwrapped(raw: bytes) -> bytes:
    """An element of raw BYTES has its length before it; many clients leave it out."""
    if len(raw) >= 4 and struct.unpack_from("<I", raw)[0] == len(raw) - 4:
        return raw[4:]
    return raw


def _params(inputs: dict[str, bytes]) -> dict[str, Any]:
    text = inputs.get("params")
    if not text:
        return {}
    try:
        params = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_request("params", f"is no JSON: {error}") from None
    if not isinstance(params, dict):
        raise bad_request("params", "must be a JSON object")
    return params


def _response(request: Any, name: str, data: bytes) -> Any:
    """One output, given back the way that the inputs came."""
    response = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    output = response.outputs.add(name=name, datatype="BYTES", shape=[1])
    if request.raw_input_contents:
        response.raw_output_contents.append(data)
    else:
        output.contents.bytes_contents.append(data)
    return response
