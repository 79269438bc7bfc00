"""KServe's gRPC in front of the speech models."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from engine_plugin.engines.openvino.runner.kserve import serve_grpc
from engine_plugin.engines.openvino.stubs import kserve_pb2 as pb
from tests.openvino.runner_front.conftest import KEY
from tests.openvino.runner_front.test_answers import wav_file
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.openvino.runner_front.conftest import Serve

WAV = wav_file(struct.pack("<4h", 0, 16384, -1, 0))
AUTHORIZED = (("authorization", f"Bearer {KEY}"),)


class Client:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def call(self, method: str, request: Any, metadata: Any = AUTHORIZED) -> Any:
        described = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[method]
        call = self._channel.unary_unary(
            f"/inference.GRPCInferenceService/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=getattr(pb, described.output_type.name).FromString,
        )
        return await call(request, metadata=metadata, timeout=LIMIT)

    async def refused(self, method: str, request: Any, metadata: Any = AUTHORIZED) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await self.call(method, request, metadata)
        return refusal.value.code(), refusal.value.details() or ""

    async def converse(self, *requests: Any) -> list[Any]:
        call = self._channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )(iter(requests), metadata=AUTHORIZED, timeout=LIMIT)
        return [response async for response in call]


@pytest_asyncio.fixture
async def client(serve: Serve) -> AsyncIterator[Client]:
    front = await serve()
    front.config.add("t", "speech-to-text")
    front.config.add("s", "text-to-speech")
    assert await front.reload() == 201
    server, address = await serve_grpc(front.registry, KEY, 0)
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield Client(channel)
    finally:
        await server.stop(None)


def asked(model: str, raw: bool = False, **inputs: Any) -> Any:
    """A ModelInferRequest."""
    request = pb.ModelInferRequest(model_name=model, id="7")
    for name, value in inputs.items():
        data = json.dumps(value).encode() if isinstance(value, dict) else value
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
        if raw:
            request.raw_input_contents.append(data)
        else:
            tensor.contents.bytes_contents.append(data)
    return request


async def test_the_server_and_its_models_are_told(client: Client) -> None:
    assert (await client.call("ServerLive", pb.ServerLiveRequest(), ())).live
    assert (await client.call("ServerReady", pb.ServerReadyRequest(), ())).ready
    assert (await client.call("ServerMetadata", pb.ServerMetadataRequest())).version
    assert (await client.call("ModelReady", pb.ModelReadyRequest(name="t"))).ready
    assert not (await client.call("ModelReady", pb.ModelReadyRequest(name="x"))).ready
    metadata = await client.call("ModelMetadata", pb.ModelMetadataRequest(name="t"))
    assert [tensor.name for tensor in metadata.inputs] == ["audio", "params"]
    assert [tensor.name for tensor in metadata.outputs] == ["result"]


@pytest.mark.parametrize("raw", [False, True])
async def test_speech_to_text(client: Client, raw: bool) -> None:
    response = await client.call("ModelInfer", asked("t", raw, audio=WAV, params={"language": "en"}))
    assert response.id == "7"
    data = response.raw_output_contents[0] if raw else response.outputs[0].contents.bytes_contents[0]
    result = json.loads(data)
    assert json.loads(result["text"])["count"] == 4
    assert result["language"] == "en"
    assert result["segments"] == [{"id": 0, "start": 0.0, "end": 0.5, "text": "a b"}]


async def test_raw_elements_may_have_their_length_before_them(client: Client) -> None:
    request = asked("t", True, audio=struct.pack("<I", len(WAV)) + WAV)
    assert (await client.call("ModelInfer", request)).raw_output_contents


async def test_text_to_speech(client: Client) -> None:
    response = await client.call("ModelInfer", asked("s", text=b"hi", voice=b"", params={"speed": 1.0}))
    assert response.outputs[0].name == "audio"
    assert response.outputs[0].contents.bytes_contents[0].startswith(b"RIFF")


async def test_a_conversation_has_its_result_at_the_end(client: Client) -> None:
    params = {"action": "run-task", "audio_format": "pcm", "sample_rate": 16000}
    begin = asked("t", params=params)
    (response,) = await client.converse(begin, asked("t", audio=b"\0\0\0\0"), asked("t", audio=b"\0\0"), asked("t"))
    assert response.error_message == ""
    result = json.loads(response.infer_response.outputs[0].contents.bytes_contents[0])
    assert json.loads(result["content"])["count"] == 3
    assert result["is_final"] is True
    (response,) = await client.converse(asked("x", audio=b"\0\0"))
    assert "x is not served" in response.error_message


async def test_what_is_wrong_has_its_status(client: Client) -> None:
    code = grpc.StatusCode
    infer = "ModelInfer"
    assert (await client.refused(infer, asked("t"), ()))[0] is code.UNAUTHENTICATED
    assert (await client.refused(infer, asked("x")))[0] is code.NOT_FOUND
    assert (await client.refused(infer, asked("m")))[0] is code.INVALID_ARGUMENT
    assert await client.refused(infer, asked("t")) == (code.INVALID_ARGUMENT, "audio: is missing")
    assert "params:" in (await client.refused(infer, asked("t", audio=WAV, params=b"[")))[1]
    assert "file:" in (await client.refused(infer, asked("t", audio=b"mp3")))[1]
    deep = b"[" * 100_000
    assert "params:" in (await client.refused(infer, asked("t", audio=WAV, params=deep)))[1]
    for rate in (-1, 0, 1 << 40):
        pcm = asked("t", audio=b"\0\0", params={"audio_format": "pcm", "sample_rate": rate})
        assert (await client.refused(infer, pcm))[1].startswith("params.sample_rate:")
