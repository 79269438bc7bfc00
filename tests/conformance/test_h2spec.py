"""h2spec, a conformance test suite for HTTP/2 servers, finds no fault in the server."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from engine_plugin.server.native import NativeServer
from tests.patience import patience

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_LIMIT = patience(60)
JUDGE = "github.com/summerwind/h2spec/cmd/h2spec"
_CASES = 145


@asynccontextmanager
async def relay(path: Path) -> AsyncIterator[str]:
    """A TCP port whose bytes go to a unix socket and back: h2spec knows only TCP."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:
            writer.transport.abort()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        try:
            await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))
        finally:
            inner_writer.close()
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield str(server.sockets[0].getsockname()[1])


async def judged(judges: Path, port: str) -> str:
    """The report of h2spec on the server at a port of 127.0.0.1."""
    process = await asyncio.create_subprocess_exec(
        judges / "h2spec", "-h", "127.0.0.1", "-p", port, "-o", "10", stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(_LIMIT):
        out, _ = await process.communicate()
    return out.decode()


@pytest.mark.promise("G41")
@pytest.mark.slow
@pytest.mark.parametrize("network", ["tcp", "unix"])
async def test_h2spec_passes(judges: Path, network: str, short_dir: Path) -> None:
    server = NativeServer()
    try:
        if network == "tcp":
            report = await judged(judges, (await server.start("127.0.0.1:0")).rpartition(":")[2])
        else:
            await server.start(f"unix:{short_dir}/sock")
            async with relay(short_dir / "sock") as port:
                report = await judged(judges, port)
    finally:
        await server.stop(0)
    assert re.search(rf"^{_CASES} tests, {_CASES} passed, 0 skipped, 0 failed$", report, re.MULTILINE), report
