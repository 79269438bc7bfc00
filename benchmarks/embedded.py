"""OpenVINO's embedded server, started as its driver starts it, and reached by its own HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from engine_plugin.process.child import STDOUT, ChildProcess
from engine_plugin.process.python import module_command, module_environ
from engine_plugin.transport import sse
from engine_plugin.transport.http1 import Http1Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

__all__ = ["MODEL", "SERVER", "Embedded", "embedded_server"]

SERVER = "server"
MODEL = "bench"
CHAT_PATH = "/v3/chat/completions"
_SERVER = "openvino_server"
_START_LIMIT = 60.0
_READY_LIMIT = 120.0
_ANSWER_LIMIT = 64 * 1024 * 1024


class Embedded:
    """The server with the model loaded. It is a `Target`; `address` is HOST:PORT or unix:PATH."""

    name = SERVER

    def __init__(self, address: str, client: Http1Client) -> None:
        self.address = address
        self._client = client

    async def call(self, service: str, body: bytes) -> bytes:
        """Send a chat and read its whole answer."""
        if service != "chat":
            raise ValueError(f"{service}: only chat is measured here")
        async with self._client.request("POST", CHAT_PATH, body) as response:
            return await response.read(_ANSWER_LIMIT)

    @asynccontextmanager
    async def stream(self, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """Stream a chat in blocks of whole events."""
        async with self._client.request("POST", CHAT_PATH, body) as response:
            if response.status != 200:
                raise RuntimeError(f"{self.name}: {(await response.read(_ANSWER_LIMIT)).decode()}")
            yield sse.whole_events(response)


def _write_config(folder: Path, model: Path, options: Mapping[str, Any]) -> Path:
    """config.json as the driver writes it. Returns its path."""
    folder.mkdir(parents=True)
    entry = {"name": MODEL, "kind": "chat", "folder": str(model), "device": "CPU", "options": dict(options)}
    file = folder / "config.json"
    file.write_text(json.dumps({"models": [entry]}), encoding="utf-8")
    return file


@asynccontextmanager
async def embedded_server(
    folder: Path, sockets: Path, model: Path, threads: int, scheduler: Mapping[str, Any]
) -> AsyncIterator[Embedded]:
    """A server of its own for one chat model. Ended when left; raises TimeoutError or RuntimeError when it fails."""
    key = secrets.token_hex(16)
    settings = {
        "host": "127.0.0.1" if sys.platform == "win32" else str(sockets / "embedded.sock"),
        "port": 0,
        "key": key,
        "config": str(_write_config(folder / "served", model, scheduler)),
        "threads": threads,
        "max_queue": 256,
        "cache_dir": str(folder / "cache"),
        "memory_limit": 0,
    }
    said = bytearray()
    first_line: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def take(stream: int, data: bytes) -> None:
        if stream != STDOUT:
            sys.stderr.buffer.write(data)
            return
        said.extend(data)
        if b"\n" in said and not first_line.done():
            first_line.set_result(json.loads(said[: said.index(b"\n")]))

    line = json.dumps(settings).encode() + b"\n"
    command, environ = module_command(_SERVER, "serve"), module_environ(dict(os.environ))
    process = ChildProcess(take=take)
    await process.spawn(command, environ, stdin=line)
    try:
        waiting: set[asyncio.Future[Any]] = {first_line, process.exited}
        await asyncio.wait(waiting, timeout=_START_LIMIT, return_when=asyncio.FIRST_COMPLETED)
        if not first_line.done():
            raise RuntimeError("the embedded server ended, or does not listen; its last words are above")
        address = str(first_line.result()["address"]).removeprefix("http://")
        client = Http1Client(_endpoint(address), {"authorization": f"Bearer {key}"})
        try:
            await _until_ready(client)
            yield Embedded(address, client)
        finally:
            client.close()
    finally:
        await process.kill()


def _endpoint(address: str) -> str | tuple[str, int]:
    if address.startswith("unix:"):
        return address.removeprefix("unix:")
    host, _, port = address.rpartition(":")
    return host, int(port)


async def _until_ready(client: Http1Client) -> None:
    async with asyncio.timeout(_READY_LIMIT):
        while True:
            async with client.request("GET", "/v3/models") as response:
                if json.loads(await response.read(_ANSWER_LIMIT))["data"]:
                    return
            await asyncio.sleep(0.05)
