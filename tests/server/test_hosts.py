"""What hosts may do to the gRPC server: ping it without end, and call it a thousand times at once."""

from __future__ import annotations

import asyncio
import struct
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest

from engine_plugin.errors import InvalidRequestError
from engine_plugin.host import connect, link
from engine_plugin.jsontext import MOST_MESSAGE
from engine_plugin.protocol.stubs import provider_pb2 as pb
from engine_plugin.server import grpc_aio, native, new_server
from engine_plugin.server.seam import RpcService
from tests.goplugin.conftest import launch as launch  # noqa: PLC0414  # fixtures
from tests.goplugin.conftest import start as start  # noqa: PLC0414
from tests.goplugin.tls_client import GREETING, TlsClient, client_context

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from engine_plugin.server.seam import Call
    from tests.goplugin.conftest import Launch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the servers of these tests listen on unix sockets")

PINGS = 40
STREAMS = 1500
LIMIT = 60.0  # seconds; bounds every wait
_PING, _GOAWAY, _ACK = 6, 7, 1


def ping(number: int) -> bytes:
    return bytes((0, 0, 8, _PING, 0, 0, 0, 0, 0)) + struct.pack(">Q", number)


async def answered(pings: int, send: Callable[[bytes], Awaitable[None]], read: Callable[[], Awaitable[bytes]]) -> int:
    """Send pings one by one, and return how many were answered before the server closed the connection."""
    data = b""
    for number in range(pings):
        await send(ping(number))
        while True:
            if len(data) < 9 or len(data) < 9 + (length := int.from_bytes(data[:3])):
                part = await read()
                if not part:
                    return number
                data += part
                continue
            kind, flags, body, data = data[3], data[4], data[9 : 9 + length], data[9 + length :]
            if kind == _GOAWAY:
                return number
            if kind == _PING and flags & _ACK and body == struct.pack(">Q", number):
                break
    return pings


@pytest.mark.promise("L4")
async def test_pings_without_a_call_are_answered(short_dir: Path) -> None:
    server = new_server()
    await server.start(f"unix:{short_dir}/sock")
    reader, writer = await asyncio.open_unix_connection(short_dir / "sock")
    try:
        writer.write(GREETING)

        async def send(data: bytes) -> None:
            writer.write(data)

        async with asyncio.timeout(LIMIT):
            assert await answered(PINGS, send, lambda: reader.read(1 << 16)) == PINGS
    finally:
        writer.close()
        await server.stop(0)


@pytest.mark.promise("L4")
async def test_pings_through_tls_are_answered(launch: Launch) -> None:
    plugin = await launch(tls=True)
    assert plugin.identity is not None
    context = client_context(plugin.identity, plugin.certificate)
    async with await TlsClient.connect(f"unix:{plugin.address}", context) as client:
        await client.greet()
        async with asyncio.timeout(LIMIT):
            assert await answered(PINGS, client.send, client.read) == PINGS


class Provider:
    """Answers InvokeServiceStream, and any other rpc alike."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.InvokeServiceStream  # every rpc must be there

    async def InvokeServiceStream(self, _request: Any, call: Call) -> None:  # noqa: N802
        await call.send(pb.InvokeServiceStreamResponse(code=200, chunk_data=b"x"))


async def streamed(channel: grpc.aio.Channel, data: bytes = b"") -> str:
    """The status that a stream ended with."""
    call: Any = channel.unary_stream(
        "/protocol.ProviderService/InvokeServiceStream",
        request_serializer=pb.InvokeServiceRequest.SerializeToString,
        response_deserializer=pb.InvokeServiceStreamResponse.FromString,
    )(pb.InvokeServiceRequest(service_name="chat", request_data=data))
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


@pytest.mark.promise("X9")
async def test_thousand_concurrent_streams_are_answered(short_dir: Path) -> None:
    """All requests are sent before the server's process reads the first."""
    server = new_server()
    server.add(RpcService(pb.DESCRIPTOR.services_by_name["ProviderService"], Provider()))
    await server.start(f"unix:{short_dir}/sock")
    try:
        async with grpc.aio.insecure_channel(f"unix:{short_dir}/sock") as channel, asyncio.timeout(LIMIT):
            ends = await asyncio.gather(*(streamed(channel) for _ in range(STREAMS)))
        assert Counter(ends) == {"OK": STREAMS}
    finally:
        await server.stop(0)


@pytest.mark.promise("X8")
async def test_oversized_message_ends_only_its_own_call(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other hosts get the status; this package's host raises before it sends."""
    assert ("grpc.max_receive_message_length", MOST_MESSAGE) in grpc_aio._OPTIONS
    limit = 8 << 20
    monkeypatch.setattr(grpc_aio, "_OPTIONS", (("grpc.max_receive_message_length", limit),))
    monkeypatch.setattr(native, "MOST_MESSAGE", limit)
    monkeypatch.setattr(link, "MOST_MESSAGE", limit)
    server = new_server()
    server.add(RpcService(pb.DESCRIPTOR.services_by_name["ProviderService"], Provider()))
    address = await server.start(f"unix:{short_dir}/sock")
    try:
        async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(LIMIT):
            assert await streamed(channel, b"x" * limit) == "RESOURCE_EXHAUSTED"
            assert await streamed(channel, b"x" * (limit - 100)) == "OK"
        async with await connect(address) as client, asyncio.timeout(LIMIT):
            with pytest.raises(InvalidRequestError, match=r"InvokeServiceRequest: \d+ bytes exceed .* 256 MiB"):
                async with client.stream("chat", b"x" * limit):
                    pass
            async with client.invoke_bidi("chat") as talk:
                with pytest.raises(InvalidRequestError, match=r"InvokeServiceBidiRequest: \d+ bytes exceed"):
                    await talk.send(b"x" * limit)
    finally:
        await server.stop(0)
