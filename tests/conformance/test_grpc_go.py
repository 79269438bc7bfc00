"""grpc-go judges the native implementation: its interop client calls the server, its server answers the channel."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from engine_plugin.host.seam import RpcFailure
from tests.patience import patience, until, within
from tests.rpc.client_cases import CASES, empty_call, wanted
from tests.rpc.interop import rpc
from tests.rpc.test_calls import channel_to, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.promise("G41")]

JUDGE = "."
CLIENT_CASES = (
    "cancel_after_begin",
    "cancel_after_first_response",
    "client_streaming",
    "empty_stream",
    "empty_unary",
    "large_unary",
    "pick_first_unary",
    "ping_pong",
    "server_streaming",
    "special_status_message",
    "status_code_and_message",
    "timeout_on_sleeping_server",
    "unimplemented_method",
    "unimplemented_service",
)
"""All cases of grpc-go's interop client but those that docs/design.md lists with reasons."""


async def judged(judges: Path, target: str, case: str, *options: str) -> None:
    process = await asyncio.create_subprocess_exec(
        judges / "judges", *options, "client", target, case, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(patience(60)):
        _, log = await process.communicate()
    assert process.returncode == 0, log.decode()


async def test_every_case_is_run(judges: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        judges / "judges", "client", "unix:/dev/null", "list", stdout=asyncio.subprocess.PIPE
    )
    listed, _ = await within(process.communicate())
    assert tuple(listed.decode().split()) == CLIENT_CASES


@pytest.mark.parametrize("case", CLIENT_CASES)
async def test_interop_client_passes(judges: Path, case: str, short_dir: Path) -> None:
    async with serving(f"unix:{short_dir}/s") as target:
        await judged(judges, target, case)


@pytest.mark.parametrize("case", ["large_unary", "ping_pong"])
async def test_interop_client_passes_at_a_tcp_port(judges: Path, case: str) -> None:
    async with serving("127.0.0.1:0") as target:
        await judged(judges, target, case)


@pytest.mark.parametrize("case", ["large_unary", "client_streaming", "ping_pong"])
async def test_interop_client_passes_with_gzip(judges: Path, case: str, short_dir: Path) -> None:
    async with serving(f"unix:{short_dir}/s") as target:
        await judged(judges, target, case, "-gzip")


@pytest.mark.parametrize(
    "options",
    [
        ("-header", "10000"),
        ("-header", "60000"),
        ("-authority", "localhost:1"),
        ("-authority", "a_b.c~%2Fs"),
    ],
    ids=" ".join,
)
async def test_interop_client_passes_with_other_headers(
    judges: Path, options: tuple[str, str], short_dir: Path
) -> None:
    async with serving(f"unix:{short_dir}/s") as target:
        await judged(judges, target, "ping_pong", *options)


@contextlib.asynccontextmanager
async def grpc_go_server(judges: Path, address: str, *options: str) -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        judges / "judges",
        *options,
        "server",
        address,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        bound = (await within(process.stdout.readline())).decode().strip()
        yield address if address.startswith("unix:") else bound
    finally:
        process.stdin.close()
        await within(process.wait())


@pytest.mark.parametrize("network", ["unix", "tcp"])
@pytest.mark.parametrize("name", CASES)
async def test_channel_calls_the_server_of_grpc_go(judges: Path, name: str, network: str, short_dir: Path) -> None:
    address = f"unix:{short_dir}/s" if network == "unix" else "127.0.0.1:0"
    async with grpc_go_server(judges, address) as target, channel_to(target) as channel:
        await CASES[name](channel)


@pytest.mark.parametrize("name", ["unary_call_of_64_mebibytes", "streamed_answer", "both_streams"])
async def test_channel_reads_answers_in_gzip(judges: Path, name: str, short_dir: Path) -> None:
    async with grpc_go_server(judges, f"unix:{short_dir}/s", "-gzip") as target, channel_to(target) as channel:
        await CASES[name](channel)


async def test_channel_waits_while_a_connection_has_all_the_streams_that_it_may_have(
    judges: Path, short_dir: Path
) -> None:
    async with (
        grpc_go_server(judges, f"unix:{short_dir}/s", "-streams", "3") as target,
        channel_to(target) as channel,
    ):
        await empty_call(channel)
        await CASES["five_hundred_calls_at_once"](channel)


async def test_channel_connects_again_when_a_connection_becomes_too_old(judges: Path, short_dir: Path) -> None:
    """The server ends each connection by GOAWAY after 0.2 s; a call under way may go on."""
    async with (
        grpc_go_server(judges, f"unix:{short_dir}/s", "-age", "200ms") as target,
        channel_to(target) as channel,
    ):
        await empty_call(channel)
        first = channel._connection
        call = channel.begin(rpc("StreamingOutputCall"), wanted(*[7] * 8, interval=100_000), timeout=None)
        assert [len((await within(call.read())).payload.body) for _ in range(8)] == [7] * 8
        await until(lambda: not channel.connected, "the server ends the connection")
        for _ in range(20):
            await empty_call(channel)
        assert channel._connection is not first


async def test_channel_answers_the_pings_of_a_server(judges: Path, short_dir: Path) -> None:
    """An idle connection is pinged after a second, and closed when no answer comes within another."""
    async with (
        grpc_go_server(judges, f"unix:{short_dir}/s", "-ping", "1s") as target,
        channel_to(target) as channel,
    ):
        call = channel.begin(rpc("StreamingOutputCall"), wanted(1, interval=3_500_000), timeout=None)
        assert len((await within(call.read())).payload.body) == 1
        assert channel.connected


async def test_calls_fail_when_their_server_stops(judges: Path, short_dir: Path) -> None:
    async with channel_to(f"unix:{short_dir}/s") as channel:
        async with grpc_go_server(judges, f"unix:{short_dir}/s"):
            await empty_call(channel)
            call = channel.begin(rpc("StreamingOutputCall"), wanted(1, interval=5_000_000), timeout=None)
            await empty_call(channel)
        with pytest.raises(RpcFailure) as caught:
            await within(call.read())
        assert caught.value.status == 14
