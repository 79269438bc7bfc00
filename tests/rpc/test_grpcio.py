"""The native implementation and grpcio's: its server answers our channel, its clients call our server."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.patience import pace, until, within
from tests.rpc.client_cases import CASES, NEVER, SPECIAL, wanted
from tests.rpc.interop import TestService, message, payload, rpc, service
from tests.rpc.test_calls import channel_to, serving

grpc = pytest.importorskip("grpc")
aio = pytest.importorskip("grpc.aio")

from engine_plugin.server.grpc_aio import AioServer  # noqa: E402  # imports grpcio
from engine_plugin.server.native import NativeServer  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from engine_plugin.server.seam import RpcServer

pytestmark = pytest.mark.promise("G41")


@pytest.mark.parametrize("name", CASES)
async def test_channel_calls_the_server_of_grpcio(name: str, short_dir: Path) -> None:
    server = AioServer()
    server.add(service())
    address = await server.start(f"unix:{short_dir}/s")
    try:
        async with channel_to(address) as channel:
            await CASES[name](channel)
    finally:
        await server.stop(0)


@asynccontextmanager
async def grpcio_channel(address: str, **options: Any) -> AsyncIterator[Any]:
    longest = {"grpc.max_receive_message_length": -1, "grpc.use_local_subchannel_pool": 1}
    async with aio.insecure_channel(address, options=list((longest | options).items())) as channel:
        yield channel


def method(channel: Any, name: str) -> Any:
    descriptor = rpc(name)
    kind = "_".join(
        "stream" if side else "unary" for side in (descriptor.client_streaming, descriptor.server_streaming)
    )
    return getattr(channel, kind)(
        f"/grpc.testing.TestService/{name}",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=type(message(descriptor.output_type.name)).FromString,
    )


async def empty_call(channel: Any, **options: Any) -> None:
    assert await within(method(channel, "EmptyCall")(message("Empty"), **options)) == message("Empty")


async def failure(call: Any) -> Any:
    with pytest.raises(aio.AioRpcError) as caught:
        await within(call)
    return caught.value


@pytest.mark.parametrize("compression", ["NoCompression", "Gzip"])
async def test_grpcio_calls_the_server_with_messages_of_any_length(compression: str, short_dir: Path) -> None:
    how = {"compression": getattr(grpc.Compression, compression)}
    size = 64 << 20
    async with serving(f"unix:{short_dir}/s") as address, grpcio_channel(address) as channel:
        await empty_call(channel, **how)
        request = message("SimpleRequest", response_size=size, payload=payload(size))
        assert len((await within(method(channel, "UnaryCall")(request, **how), 60)).payload.body) == size
        sizes = (0, 1, 3 << 20, 45904)
        requests = (message("StreamingInputCallRequest", payload=payload(size)) for size in sizes)
        answer = await within(method(channel, "StreamingInputCall")(requests, **how))
        assert answer.aggregated_payload_size == sum(sizes)
        call = method(channel, "FullDuplexCall")(**how)
        for size in sizes:
            await within(call.write(wanted(size, payload=payload(size))))
            assert len((await within(call.read())).payload.body) == size
        await call.done_writing()
        assert await within(call.read()) is aio.EOF


async def test_grpcio_gets_each_status(short_dir: Path) -> None:
    async with serving(f"unix:{short_dir}/s") as address, grpcio_channel(address) as channel:
        for code in range(1, 17):
            request = message("SimpleRequest", response_status={"code": code, "message": SPECIAL})
            error = await failure(method(channel, "UnaryCall")(request))
            assert (error.code().value[0], error.details()) == (code, SPECIAL)
        error = await failure(method(channel, "StreamingOutputCall")(wanted(1, interval=NEVER), timeout=0.05).read())
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        unknown = channel.unary_unary("/grpc.testing.Unknown/Call")
        assert (await failure(unknown(b""))).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_handler_ends_when_grpcio_cancels_its_call(short_dir: Path) -> None:
    servicer = TestService()
    async with serving(f"unix:{short_dir}/s", servicer) as address, grpcio_channel(address) as channel:
        call = method(channel, "FullDuplexCall")()
        await within(call.write(wanted(5)))
        await within(call.read())
        assert servicer.running == 1
        call.cancel()
        await until(lambda: servicer.running == 0, "the handler ends")


async def test_grpcio_may_ping_at_any_rate(short_dir: Path) -> None:
    pings = {
        "grpc.keepalive_time_ms": 10,
        "grpc.keepalive_timeout_ms": 60_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
    }
    async with serving(f"unix:{short_dir}/s") as address, grpcio_channel(address, **pings) as channel:
        call = method(channel, "StreamingOutputCall")(wanted(1, interval=int(pace(0.5) * 1e6)))
        await within(call.read())
        await asyncio.sleep(pace(0.2))
        await empty_call(channel)
        assert channel.get_state() is grpc.ChannelConnectivity.READY


async def test_grpcio_sends_metadata(short_dir: Path) -> None:
    async with serving(f"unix:{short_dir}/s") as address, grpcio_channel(address) as channel:
        await empty_call(channel, metadata=[("a", "x" * 10_000), ("b-bin", bytes(range(256)) * 20), ("a", "again")])
        await empty_call(channel, metadata=[(f"key-{number}", "") for number in range(900)])


MUCH = {
    "bytes": [(f"key-{number}", "x" * 30_000) for number in range(10)],
    "fields": [("a", "b")] * 10_000,
}


@pytest.mark.parametrize("metadata", MUCH.values(), ids=list(MUCH))
async def test_metadata_may_exceed_the_announced_limit(metadata: list[tuple[str, str]], short_dir: Path) -> None:
    """grpcio does not heed it. A single value above 64 KiB ends the connection: the core cannot do otherwise."""
    async with serving(f"unix:{short_dir}/s") as address, grpcio_channel(address) as channel:
        call = method(channel, "FullDuplexCall")()
        await within(call.write(wanted(5)))
        await within(call.read())
        await empty_call(channel, metadata=metadata)
        await within(call.write(wanted(5)))
        assert len((await within(call.read())).payload.body) == 5


@pytest.mark.parametrize("name", ["a b", "ä", "100%", "a@b", "@", "a:b", "~", "[x]"])
async def test_grpcio_calls_the_server_at_any_path(name: str, short_dir: Path) -> None:
    (short_dir / name).mkdir()
    async with serving(f"unix:{short_dir}/{name}/s") as address, grpcio_channel(address) as channel:
        await empty_call(channel)


@pytest.mark.parametrize(
    "authority", ["localhost", "localhost:1", "[::1]:50051", "user_name", "a.b-c~", "%2Ftmp%2Fs"]
)
async def test_grpcio_may_send_any_authority(authority: str, short_dir: Path) -> None:
    async with (
        serving(f"unix:{short_dir}/s") as address,
        grpcio_channel(address, **{"grpc.default_authority": authority}) as channel,
    ):
        await empty_call(channel)


@pytest.mark.parametrize("kind", [NativeServer, AioServer])
async def test_status_with_a_long_message_reaches_grpcio(kind: Callable[[], RpcServer], short_dir: Path) -> None:
    """Its clients replace the status of a call with too long headers."""
    server = kind()
    server.add(service())
    address = await server.start(f"unix:{short_dir}/s")
    try:
        async with grpcio_channel(address) as channel:
            for text in ("x" * 100_000, "%" * 100_000, "語" * 100_000):
                request = message("SimpleRequest", response_status={"code": 9, "message": text})
                with pytest.raises(aio.AioRpcError) as caught:
                    await within(method(channel, "UnaryCall")(request))
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                assert text.startswith(caught.value.details())
                assert len(caught.value.details()) > 400
    finally:
        await server.stop(0)
