"""Start, stop and invalid requests: the same answers on the wire whatever the engine."""

from __future__ import annotations

import asyncio

import pytest

from engine_plugin.errors import InvalidRequestError, NotFoundError, UnavailableError
from engine_plugin.host import OperateStatus
from tests.patience import LIMIT

from .world import World, text_of

pytestmark = pytest.mark.asyncio(loop_scope="package")


async def test_started_engine_is_ready_and_has_a_version(world: World) -> None:
    assert (await world.plugin.health_check()).startswith("ready")
    assert await world.plugin.get_version()
    assert (await world.plugin.check_engine()).installed
    assert await world.plugin.get_operate_status() is OperateStatus.RUNNING


async def test_stopped_engine_error_names_start_engine_and_it_restarts(world: World) -> None:
    await world.plugin.stop_engine()
    assert await world.plugin.get_operate_status() is OperateStatus.STOPPED
    with pytest.raises(UnavailableError, match="StartEngine"):
        await world.plugin.invoke("chat", world.chat())
    with pytest.raises(UnavailableError):
        await world.plugin.health_check()
    await asyncio.gather(*(world.plugin.start_engine() for _ in range(3)))
    assert text_of(await world.plugin.invoke("chat", world.chat()))


async def test_stop_ends_running_streams(world: World) -> None:
    async with asyncio.timeout(LIMIT):
        async with world.plugin.stream("chat", world.chat(max_tokens=900, ignore_eos=True)) as chunks:
            assert await anext(aiter(chunks))
            await world.plugin.stop_engine()
        await world.plugin.start_engine()


@pytest.mark.parametrize(
    ("service", "request_data", "told"),
    [
        ("chat", b"", "request_data"),
        ("chat", b"[]", "request_data"),
        ("chat", b'{"messages": []}', "messages"),
        ("chat", b'{"messages": [{"content": "no role"}]}', "messages"),
        ("chat", b'{"messages": [{"role": "user", "content": "a"}], "model": 7}', "model"),
        ("generate", b"{}", "prompt"),
        ("embed", b"{}", "input"),
    ],
)
async def test_invalid_request_error_names_the_field(
    world: World, service: str, request_data: bytes, told: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{told}"):
        await world.plugin.invoke_raw(service, request_data)


async def test_unknown_service_error_lists_the_services(world: World) -> None:
    with pytest.raises(NotFoundError, match=r"sing.*chat"):
        await world.plugin.invoke("sing", {})


async def test_stream_of_a_unary_service_is_rejected(world: World) -> None:
    with pytest.raises(Exception, match="does not stream"):
        await world.streamed("embed", world.request("embed", input="a"))


async def test_empty_input_is_answered_without_the_engine(world: World) -> None:
    answer = await world.plugin.invoke("embed", world.request("embed", input=[]))
    assert answer["data"] == []
