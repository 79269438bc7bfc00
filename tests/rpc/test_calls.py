"""Calls between a channel and a server of this package, and a server whose client does the unusual."""

from __future__ import annotations

import asyncio
import ssl
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import ngh2
import pytest
from ngh2 import events

from engine_plugin.host.native import NativeChannel
from engine_plugin.host.seam import RpcFailure
from engine_plugin.rpc.wire import prefixed
from engine_plugin.server import native
from engine_plugin.server.native import NativeServer
from tests.patience import until, within
from tests.rpc.interop import TestService, message, payload, rpc, service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from engine_plugin.server.seam import Call


def request_head(method: str, *more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", f"/grpc.testing.TestService/{method}".encode()),
        (b":authority", b"a"),
        (b"content-type", b"application/grpc"),
        *more,
    ]


@asynccontextmanager
async def serving(
    address: str, servicer: TestService | None = None, server: NativeServer | None = None
) -> AsyncIterator[str]:
    server = server or NativeServer()
    server.add(service(servicer))
    try:
        yield await server.start(address)
    finally:
        await server.stop(0)


@asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[NativeChannel]:
    channel = NativeChannel(address)
    try:
        yield channel
    finally:
        await channel.close()


class Slow(TestService):
    """Reads a streamed request only after a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = asyncio.Event()

    async def StreamingInputCall(self, call: Call) -> Any:
        await self.reads.wait()
        return await super().StreamingInputCall(call)


@pytest.mark.promise("G43")
async def test_message_longer_than_the_window_follows_one_not_read_yet(short_dir: Path) -> None:
    slow = Slow()
    async with serving(f"unix:{short_dir}/s", slow) as address, channel_to(address) as channel:
        call = channel.begin(rpc("StreamingInputCall"), timeout=None)
        await call.write(message("StreamingInputCallRequest", payload=payload(10)))
        writing = asyncio.create_task(call.write(message("StreamingInputCallRequest", payload=payload(3 << 20))))
        await within(channel.begin(rpc("EmptyCall"), message("Empty"), timeout=None).read())
        slow.reads.set()
        await within(writing)
        await call.done_writing()
        assert (await within(call.read())).aggregated_payload_size == 10 + (3 << 20)


@pytest.mark.promise("G43")
async def test_long_answer_follows_one_not_read_yet(short_dir: Path) -> None:
    async with serving(f"unix:{short_dir}/s") as address, channel_to(address) as channel:
        sizes = [10, 3 << 20, 0, 20]
        wanted = message("StreamingOutputCallRequest", response_parameters=[{"size": size} for size in sizes])
        call = channel.begin(rpc("StreamingOutputCall"), wanted, timeout=None)
        for _ in range(5):  # the window is full by then
            await within(channel.begin(rpc("EmptyCall"), message("Empty"), timeout=None).read())
        assert [len((await within(call.read())).payload.body) for _ in sizes] == sizes
        assert await within(call.read()) is None


@pytest.mark.promise("G44")
async def test_calls_end_with_their_client(short_dir: Path) -> None:
    """The end of a process closes its side of the connection, without a reset."""
    async with serving(f"unix:{short_dir}/s"):
        reader, writer = await asyncio.open_unix_connection(short_dir / "s")
        client = ngh2.Connection(ngh2.Role.CLIENT)
        client.initiate_connection({})
        number = client.send_request(request_head("StreamingOutputCall"))
        answers = [{"size": 3}, {"size": 3, "interval_us": 1_000_000_000}]
        wanted = message("StreamingOutputCallRequest", response_parameters=answers)
        client.send_data(number, prefixed(wanted.SerializeToString()), end_stream=True)
        writer.write(client.data_to_send())
        while not any(isinstance(event, events.DataReceived) for event in client.events()):
            client.receive_data(await within(reader.read(1 << 16)))
        writer.write_eof()
        await within(reader.read())
        writer.close()


@pytest.mark.promise("G43")
async def test_long_status_message_arrives(short_dir: Path) -> None:
    async with serving(f"unix:{short_dir}/s") as address, channel_to(address) as channel:
        wanted = message("SimpleRequest", response_status={"code": 9, "message": "%" * 70_000})
        with pytest.raises(RpcFailure) as caught:
            await within(channel.begin(rpc("UnaryCall"), wanted, timeout=None).read())
        assert (caught.value.status, caught.value.details) == (9, "%" * 1333)


@pytest.mark.promise("G44")
async def test_call_is_reset_before_its_client_is_known() -> None:
    """At a TCP port the owner of the other end is looked up first."""
    async with serving("127.0.0.1:0") as address:
        _, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        client = ngh2.Connection(ngh2.Role.CLIENT)
        client.initiate_connection({})
        number = client.send_request(request_head("EmptyCall"))
        client.send_data(number, prefixed(b""), end_stream=True)
        sent = client.data_to_send()
        client.reset_stream(number)
        writer.write(sent + client.data_to_send())
        async with channel_to(address) as channel:
            await within(channel.begin(rpc("EmptyCall"), message("Empty"), timeout=None).read())
        writer.close()


@pytest.mark.promise("G44")
async def test_connection_that_fails_after_its_call_was_cancelled_fails_no_other_call(short_dir: Path) -> None:
    silent: list[asyncio.StreamWriter] = []
    async with await asyncio.start_unix_server(lambda _, writer: silent.append(writer), short_dir / "s"):
        channel = NativeChannel(f"unix:{short_dir}/s", ssl.create_default_context())
        call = channel.begin(rpc("EmptyCall"), message("Empty"), timeout=None)
        await until(lambda: bool(silent), "the channel connects")
        await call.aclose()
        silent.pop().close()
        await until(lambda: channel._connecting is None, "the handshake fails")
        channel.begin(rpc("EmptyCall"), message("Empty"), timeout=None)
        await until(lambda: bool(silent), "the channel connects again")
        await channel.close()
        silent.pop().close()


@pytest.mark.promise("G46")
async def test_long_requests_are_bounded_together(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_MOST_LARGE", 4 << 20)
    request = message("SimpleRequest", response_size=1, payload=payload(3 << 20))
    server = NativeServer()
    async with serving(f"unix:{short_dir}/s", server=server) as address, channel_to(address) as channel:
        held = channel.begin(rpc("StreamingInputCall"), timeout=None)
        await within(held.write(message("StreamingInputCallRequest", payload=payload(1))))
        reader, writer = await asyncio.open_unix_connection(short_dir / "s")
        client = ngh2.Connection(ngh2.Role.CLIENT)
        client.initiate_connection({})
        number = client.send_request(request_head("UnaryCall"))
        client.send_data(number, prefixed(request.SerializeToString())[:-1])
        writer.write(client.data_to_send())
        while client.queued_body_size(number):  # all but one byte arrive, and wait
            client.receive_data(await within(reader.read(9999)))
            writer.write(client.data_to_send())
        with pytest.raises(RpcFailure) as caught:
            await within(channel.begin(rpc("UnaryCall"), request, timeout=None).read())
        assert caught.value.status == 8
        assert server.large >> 20 == 3
        writer.close()
        await until(lambda: not server.large, "the server notices that its client has left")
        answer = await within(channel.begin(rpc("UnaryCall"), request, timeout=None).read())
        assert len(answer.payload.body) == 1
        await held.done_writing()
        assert (await within(held.read())).aggregated_payload_size == 1


@pytest.mark.promise("G44")
async def test_stream_ends_on_both_sides_when_the_server_ends_the_call_first(short_dir: Path) -> None:
    server = NativeServer()
    async with serving(f"unix:{short_dir}/s", server=server) as address, channel_to(address) as channel:
        call = channel.begin(rpc("FullDuplexCall"), timeout=None)
        await call.write(message("StreamingOutputCallRequest", response_status={"code": 9}))
        with pytest.raises(RpcFailure) as caught:
            await within(call.read())
        assert caught.value.status == 9
        [ours] = channel._connections
        [theirs] = server._connections
        assert not ours.streams
        await within(channel.begin(rpc("EmptyCall"), message("Empty"), timeout=None).read())
        assert not theirs.streams


@pytest.mark.promise("G44")
async def test_handler_that_is_cancelled_from_within_ends_its_call(short_dir: Path) -> None:
    class Cancelled(TestService):
        async def EmptyCall(self, _request: Any, _call: Call) -> Any:
            raise asyncio.CancelledError

    async with serving(f"unix:{short_dir}/s", Cancelled()) as address, channel_to(address) as channel:
        with pytest.raises(RpcFailure) as caught:
            await within(channel.begin(rpc("EmptyCall"), message("Empty"), timeout=None).read(), 1)
        assert caught.value.status == 14


@pytest.mark.promise("G43")
async def test_running_calls_go_on_while_the_server_stops(short_dir: Path) -> None:
    servicer, server = TestService(), NativeServer()
    async with channel_to(f"unix:{short_dir}/s") as channel, serving(f"unix:{short_dir}/s", servicer, server):
        call = channel.begin(rpc("FullDuplexCall"), timeout=None)
        await call.write(message("StreamingOutputCallRequest", response_parameters=[{"size": 1}]))
        await within(call.read())
        reading = asyncio.create_task(call.read())
        stopping = asyncio.create_task(server.stop(5))
        await until(lambda: not channel.connected, "the server goes away")
        await call.write(message("StreamingOutputCallRequest", response_parameters=[{"size": 2}]))
        assert len((await within(reading)).payload.body) == 2, "a call under way may go on"
        await call.done_writing()
        assert await within(call.read()) is None
        await within(stopping)


class Answering(asyncio.Protocol):
    """A server that answers each call with given bytes and trailers."""

    def __init__(self, body: bytes, status: bytes = b"0") -> None:
        self._body, self._status = body, status

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._core = ngh2.Connection(ngh2.Role.SERVER)
        self._core.initiate_connection({})
        self._transport.write(self._core.data_to_send())

    def data_received(self, data: bytes) -> None:
        self._core.receive_data(data)
        for event in self._core.events():
            if isinstance(event, events.RequestReceived):
                head = ((b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-encoding", b"gzip"))
                self._core.send_response(event.stream_id, head)
                self._core.send_data(event.stream_id, self._body)
                self._core.send_trailers(event.stream_id, ((b"grpc-status", self._status),))
        self._transport.write(self._core.data_to_send())


@pytest.mark.promise("G43")
@pytest.mark.parametrize(
    "body",
    [b"\1\0\0\0\5wrong", prefixed(b"\xff"), prefixed(b"ab")[:-1], b"\0\0", b"\2\0\0\0\0"],
    ids=["not-gzip", "not-protobuf", "cut-message", "cut-prefix", "flag"],
)
async def test_broken_answer_is_an_error_in_spite_of_its_status(body: bytes, short_dir: Path) -> None:
    loop = asyncio.get_running_loop()
    listener = await loop.create_unix_server(lambda: Answering(body), short_dir / "s")
    async with listener, channel_to(f"unix:{short_dir}/s") as channel:
        call = channel.begin(rpc("StreamingOutputCall"), message("StreamingOutputCallRequest"), timeout=None)
        with pytest.raises(RpcFailure) as caught:
            await within(call.read())
        assert caught.value.status == 13


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
async def test_server_stops_while_a_client_connects(short_dir: Path, turns: int) -> None:
    """`turns` of the loop lie between connect and stop. (After none, asyncio loses the connection.)"""
    async with serving(f"unix:{short_dir}/s"):
        reader, writer = await asyncio.open_unix_connection(short_dir / "s")
        for _ in range(turns):
            await asyncio.sleep(0)
    await within(reader.read())
    writer.close()


async def test_reset_after_the_deadline_counts_as_the_deadline(short_dir: Path) -> None:
    """A server may reset a call when its deadline passes, and the reset may be read before this side's timer runs."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = ngh2.Connection(ngh2.Role.SERVER)
        server.initiate_connection({})
        while data := await reader.read(1 << 16):
            server.receive_data(data)
            requests = [event.stream_id for event in server.events() if isinstance(event, events.RequestReceived)]
            for number in requests:
                server.reset_stream(number, ngh2.ErrorCode.CANCEL)
            writer.write(server.data_to_send())
            if requests:
                time.sleep(0.1)  # noqa: ASYNC251  # so that reset and timer are due at the same turn of the loop
        writer.close()

    async with await asyncio.start_unix_server(serve, short_dir / "s"), channel_to(f"unix:{short_dir}/s") as channel:
        with pytest.raises(RpcFailure) as caught:
            await within(channel.begin(rpc("EmptyCall"), message("Empty"), timeout=0.05).read())
    assert caught.value.status == 4
