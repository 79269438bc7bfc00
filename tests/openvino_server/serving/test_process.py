"""The server's process: its start, and its end without leftovers."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import re
import socket
import stat
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import psutil
import pytest

from openvino_server.model import ModelSettings
from tests.openvino_server.serving.conftest import KEY, Config
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

PR_SET_CHILD_SUBREAPER = 36
ROOT = Path(__file__).parents[3]
SERVER = "openvino_server"


def test_usage_and_documentation_agree_with_the_settings() -> None:
    done = subprocess.run(
        [sys.executable, "-m", SERVER, "--help"], capture_output=True, text=True, timeout=LIMIT, check=True
    )
    assert done.stdout.startswith("usage: python -m openvino_server serve|probe\n")
    page = (ROOT / "docs" / "openvino-server.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (\S*) \|", page.partition("## config.json")[0], re.MULTILINE))
    own = {"host": "required", "port": "0", "key": "required", "config": "required"}
    defaults = {field.name: field.default for field in fields(ModelSettings)}
    assert table == own | {name: f"{value:g}" if value != "" else '""' for name, value in defaults.items()}


@contextmanager
def inheriting() -> Iterator[None]:
    """Who loses his parent becomes our child meanwhile."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
    try:
        yield
    finally:
        assert prctl(PR_SET_CHILD_SUBREAPER, 0) == 0


@asynccontextmanager
async def running(
    config: Config, module: str = "tests.openvino_server.serving.server", **settings: Any
) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, str]]]:
    """A server's process, and the line that it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *(["serve"] if module == SERVER else [])),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        given = {"host": str(config.root / "s.sock"), "key": KEY, "config": str(config.path)}
        process.stdin.write(json.dumps({**given, **settings}).encode() + b"\n")
        line = await asyncio.wait_for(process.stdout.readline(), LIMIT)
        yield process, json.loads(line)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def client(address: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A session for wherever it listens."""
    path = address.removeprefix("unix:")
    connector = aiohttp.UnixConnector(path) if path != address else aiohttp.TCPConnector()
    base = "http://server" if path != address else address
    async with aiohttp.ClientSession(
        base, connector=connector, headers={"Authorization": f"Bearer {KEY}"}
    ) as session:
        yield session


async def available(session: aiohttp.ClientSession) -> None:
    """Wait until the server has loaded all models without a request."""
    async with asyncio.timeout(LIMIT):
        while True:
            async with session.get("/v1/config") as response:
                states = [model["model_version_status"][0]["state"] for model in (await response.json()).values()]
            if states and set(states) == {"AVAILABLE"}:
                return


async def workers_of(process: asyncio.subprocess.Process, address: str) -> list[psutil.Process]:
    """The server's workers, when they have loaded."""
    async with client(address) as session:
        await available(session)
    found: list[psutil.Process] = psutil.Process(process.pid).children()
    return found


def two_models(root: Path) -> Config:
    config = Config(root)
    config.add("a")
    config.add("b", "embed")
    config.write()
    return config


@pytest.mark.parametrize("end", ["stdin", "kill"])
async def test_nothing_outlives_the_server(scratch: Path, end: str) -> None:
    async with running(two_models(scratch)) as (process, told):
        workers = await workers_of(process, told["address"])
        assert len(workers) == 2
        if end == "stdin":
            assert process.stdin is not None
            process.stdin.close()
            assert await asyncio.wait_for(process.wait(), LIMIT) == 0
        else:
            process.kill()
            await process.wait()
        _, left = await asyncio.to_thread(psutil.wait_procs, workers, 5)
        assert left == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs a subreaper")
async def test_server_reaps_its_workers(scratch: Path) -> None:
    """The process that inherits them, such as a container's first one, may never reap them."""
    with inheriting():
        async with running(two_models(scratch)) as (process, told):
            workers = await workers_of(process, told["address"])
            assert process.stdin is not None
            process.stdin.close()
            assert await asyncio.wait_for(process.wait(), LIMIT) == 0
        assert [worker.pid for worker in workers if psutil.pid_exists(worker.pid)] == []


async def test_end_of_stdin_ends_the_server_during_a_load(scratch: Path) -> None:
    config = Config(scratch)
    config.add("slow", load="hang")
    config.write()
    async with running(config) as (process, _):
        assert process.stdin is not None
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), LIMIT) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there are no unix sockets")
async def test_socket_is_private_and_replaces_a_stale_one(scratch: Path) -> None:
    config = Config(scratch)
    for _ in range(2):
        async with running(config) as (_, told):
            assert told == {"address": f"unix:{scratch / 's.sock'}"}
            assert stat.S_IMODE((scratch / "s.sock").stat().st_mode) == 0o600


async def test_port_zero_listens_on_a_free_port(scratch: Path) -> None:
    config = Config(scratch)
    async with running(config, SERVER, host="127.0.0.1", port=0, threads=0, cache_dir="") as (_, told):
        assert told["address"].startswith("http://127.0.0.1:")
        async with client(told["address"]) as session, session.get("/v2/health/live") as response:
            assert response.status == 200


@pytest.mark.promise("X13")
async def test_server_listens_on_its_address_only(scratch: Path) -> None:
    """KServe's gRPC port, for example, would accept 2 GB before it checks the key."""
    async with running(two_models(scratch), host="127.0.0.1", grpc_port=0) as (process, told):
        await workers_of(process, told["address"])
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        sockets = [found for one in family for found in one.net_connections() if found.status == psutil.CONN_LISTEN]
        assert [f"http://127.0.0.1:{found.laddr[1]}" for found in sockets] == [told["address"]]
        assert told.keys() == {"address"}


@pytest.mark.parametrize("way", ["folder", "port"])
async def test_unusable_address_is_reported(scratch: Path, way: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host, port = ("127.0.0.1", taken.getsockname()[1]) if way == "port" else (str(scratch / "no" / "s.sock"), 0)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", SERVER, "serve"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        settings = {"host": host, "port": port, "key": KEY, "config": str(scratch / "config.json")}
        line = json.dumps(settings).encode() + b"\n"
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(line)
        words = await asyncio.wait_for(process.stderr.read(), LIMIT)
        assert await asyncio.wait_for(process.wait(), LIMIT) == 3
    assert words.startswith(b"E cannot listen on " + host.encode())


async def test_probe_reports_version_and_devices() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", SERVER, "probe"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "ENGINE_PLUGIN_PARENT": str(os.getpid())},
    )
    output, _ = await asyncio.wait_for(process.communicate(), LIMIT)
    told = json.loads(output)
    assert told["version"].startswith("2")
    assert "CPU" in [device["name"] for device in told["devices"]]
    assert all(device["description"] for device in told["devices"])
