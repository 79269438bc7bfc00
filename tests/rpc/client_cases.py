"""What a channel must do with a server of TestService, whichever implementation of gRPC that is."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.host.seam import RpcFailure
from tests.patience import within
from tests.rpc.interop import message, payload, rpc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from engine_plugin.host.native import NativeChannel

__all__ = ["CASES", "empty_call"]

SPECIAL = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈 and 100 %\t\n"
NEVER = 60_000_000  # µs
CASES: dict[str, Callable[[NativeChannel], Awaitable[None]]] = {}


def case(function: Callable[[NativeChannel], Awaitable[None]]) -> None:
    CASES[function.__name__] = function


def wanted(*sizes: int, interval: int = 0, **fields: Any) -> Any:
    parameters = [{"size": size, "interval_us": interval} for size in sizes]
    return message("StreamingOutputCallRequest", response_parameters=parameters, **fields)


async def empty_call(channel: NativeChannel) -> None:
    call = channel.begin(rpc("EmptyCall"), message("Empty"), timeout=None)
    assert await within(call.read()) == message("Empty")
    assert await within(call.read()) is None


async def failure(call: Any) -> RpcFailure:
    with pytest.raises(RpcFailure) as caught:
        await within(call.read())
    return caught.value


case(empty_call)


@case
async def unary_call_of_64_mebibytes(channel: NativeChannel) -> None:
    size = 64 << 20
    request = message("SimpleRequest", response_size=size, payload=payload(size))
    call = channel.begin(rpc("UnaryCall"), request, timeout=None)
    assert len((await within(call.read(), 60)).payload.body) == size
    assert await within(call.read()) is None


@case
async def streamed_request(channel: NativeChannel) -> None:
    call = channel.begin(rpc("StreamingInputCall"), timeout=None)
    sizes = (27182, 8, 1828, 0, 3 << 20, 45904)
    for size in sizes:
        await within(call.write(message("StreamingInputCallRequest", payload=payload(size))))
    await call.done_writing()
    assert (await within(call.read())).aggregated_payload_size == sum(sizes)
    assert await within(call.read()) is None


@case
async def streamed_answer(channel: NativeChannel) -> None:
    sizes = [31415, 9, 0, 3 << 20, 58979] + [1] * 5000
    call = channel.begin(rpc("StreamingOutputCall"), wanted(*sizes), timeout=None)
    assert [len((await within(call.read())).payload.body) for _ in sizes] == sizes
    assert await within(call.read()) is None


async def _exchange(call: Any, sizes: Sequence[tuple[int, int]]) -> None:
    for up, down in sizes:
        await within(call.write(wanted(down, payload=payload(up))))
        assert len((await within(call.read())).payload.body) == down


@case
async def both_streams(channel: NativeChannel) -> None:
    call = channel.begin(rpc("FullDuplexCall"), timeout=None)
    await _exchange(call, [(27182, 31415), (8, 9), (3 << 20, 2 << 20), (45904, 58979)])
    await call.done_writing()
    assert await within(call.read()) is None


@case
async def empty_streams(channel: NativeChannel) -> None:
    call = channel.begin(rpc("FullDuplexCall"), timeout=None)
    await call.done_writing()
    assert await within(call.read()) is None


@case
async def answers_after_the_half_close(channel: NativeChannel) -> None:
    call = channel.begin(rpc("HalfDuplexCall"), timeout=None)
    for size in (5, 6):
        await within(call.write(wanted(size)))
    await call.done_writing()
    assert [len((await within(call.read())).payload.body) for _ in range(2)] == [5, 6]
    assert await within(call.read()) is None


@case
async def each_status(channel: NativeChannel) -> None:
    for code in range(1, 17):
        status = {"code": code, "message": SPECIAL}
        call = channel.begin(rpc("UnaryCall"), message("SimpleRequest", response_status=status), timeout=None)
        error = await failure(call)
        assert (error.status, error.details) == (code, SPECIAL)


@case
async def status_after_messages(channel: NativeChannel) -> None:
    call = channel.begin(rpc("FullDuplexCall"), timeout=None)
    await _exchange(call, [(1, 2)])
    await call.write(wanted(response_status={"code": 9, "message": "no"}))
    error = await failure(call)
    assert (error.status, error.details) == (9, "no")


@case
async def unknown_method(channel: NativeChannel) -> None:
    error = await failure(channel.begin(rpc("UnimplementedCall"), message("Empty"), timeout=None))
    assert error.status == 12


@case
async def deadline(channel: NativeChannel) -> None:
    call = channel.begin(rpc("StreamingOutputCall"), wanted(1, interval=NEVER), timeout=0.05)
    assert (await failure(call)).status == 4
    call = channel.begin(rpc("EmptyCall"), message("Empty"), timeout=0)
    assert (await failure(call)).status == 4


@case
async def cancelled_calls(channel: NativeChannel) -> None:
    call = channel.begin(rpc("FullDuplexCall"), timeout=None)
    await _exchange(call, [(1, 2)])
    reading = asyncio.create_task(failure(call))
    await asyncio.sleep(0)
    await call.aclose()
    assert (await within(reading)).status == 1
    at_once = channel.begin(rpc("StreamingInputCall"), timeout=None)
    await at_once.aclose()
    assert (await failure(at_once)).status == 1


@case
async def five_hundred_calls_at_once(channel: NativeChannel) -> None:
    await within(asyncio.gather(*(empty_call(channel) for _ in range(500))), 30)
