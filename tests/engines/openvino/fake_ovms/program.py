"""A stand-in for the program `ovms`: its command line, logs and REST API on top of the embedded server.

What differs between the two servers is here as release 2026.3 does it: only /v3 asks for the key, an error is one
text and mostly a 400, a reload looks at config.json alone and tells no reasons, and a graph that cannot be loaded
stays in the state LOADING. gRPC is not served.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import aiohttp
from aiohttp import web

from tests.engines.openvino.fake_ovms.graphs import models_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["main"]

SERVER = "openvino_server"
VERSION = "2026.3.0"
USAGE = 64
KEY = "between the stand-in and the embedded server"
_HOP = {"connection", "content-length", "host", "keep-alive", "te", "transfer-encoding", "upgrade", "authorization"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error parsing options - {message}\n")
        sys.exit(USAGE)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the real one that matter here. Any other ends the program, as the real one does."""
    parser = _Parser(prog="ovms", allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    for name in ("--port", "--rest_port"):
        parser.add_argument(name, type=int, default=0)
    for name in ("--file_system_poll_wait_seconds", "--grpc_workers", "--rest_workers"):
        parser.add_argument(name, type=int, default=1)
    for name in ("--grpc_bind_address", "--rest_bind_address"):
        parser.add_argument(name, default="0.0.0.0")
    for name in ("--config_path", "--cache_dir", "--api_key_file", "--log_path", "--grpc_channel_arguments"):
        parser.add_argument(name, default="")
    levels = ("TRACE", "DEBUG", "INFO", "WARNING", "ERROR")
    parser.add_argument("--log_level", default="INFO", choices=levels)
    parser.add_argument("--metrics_enable", action="store_true")
    known, rest = parser.parse_known_args(arguments)
    if rest:
        parser.error(f"unmatched arguments: {', '.join(rest)}, ")
    return known


def log(logger: str, level: str, text: str) -> None:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    sys.stdout.write(f"[{now}.000][{os.getpid()}][{logger}][{level}][stand_in.cpp:1] {text}\n")
    sys.stdout.flush()


class _Server:
    """The REST side. Owns the embedded server that it asks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._config = Path(options.config_path)
        self._key = self._key_of(options.api_key_file)
        self._loaded = ""
        self._failed = False
        self._known: set[str] = set()
        self._turn = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None
        # Below the data directory of the test, which is removed even if this process is killed.
        self._behind = Path(tempfile.mkdtemp(prefix=".behind-", dir=self._config.parent.parent)) / "config.json"

    @staticmethod
    def _key_of(path: str) -> str:
        if not path:
            return os.environ.get("API_KEY", "")
        return next(iter(Path(path).read_text(encoding="utf-8").splitlines()), "")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Our embedded server; what config.json names is loaded."""
        self._loaded = self._digest()
        self._pass_on()
        settings: dict[str, Any] = {
            "host": "127.0.0.1", "port": 0, "key": KEY, "config": str(self._behind),
            "threads": 0, "max_queue": 256, "cache_dir": self._options.cache_dir, "memory_limit": 0,
        }  # fmt: skip
        argv = [sys.executable, "-P", "-m", SERVER, "serve"]
        environ = {**os.environ, "ENGINE_PLUGIN_PARENT": str(os.getpid())}
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, env=environ)
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(settings).encode() + b"\n")
            await child.stdin.drain()
            told = await child.stdout.readline()
            if not told:
                log("serving", "error", "the embedded server did not start")
                sys.exit(1)
            timeout = aiohttp.ClientTimeout(total=None)
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(
                json.loads(told)["address"], connector=connector, timeout=timeout, auto_decompress=False
            ) as session:
                self._session = session
                yield
        finally:
            child.stdin.close()
            await child.wait()
            shutil.rmtree(self._behind.parent, ignore_errors=True)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/v1/config", self._status)
        app.router.add_post("/v1/config/reload", self._reload)
        app.router.add_route("*", "/v3/{rest:.*}", self._generate)
        app.router.add_route("*", "/{rest:.*}", self._forward)
        return app

    # config.json

    def _pass_on(self) -> None:
        """Write the embedded server's configuration."""
        self._behind.write_text(json.dumps({"models": models_of(self._config)}), encoding="utf-8")

    def _digest(self) -> str:
        return hashlib.sha256(self._config.read_bytes()).hexdigest()

    async def _statuses(self) -> dict[str, Any]:
        async with self._ask("GET", "/v1/config") as answer:
            states: dict[str, Any] = await answer.json()
        self._known |= set(states)
        for name in self._known - set(states):
            states[name] = {"model_version_status": [_version("END", "OK")]}
        for shape in states.values():
            status = shape["model_version_status"][0]
            if status["state"] == "END" and status["status"]["error_code"] != "OK":
                shape["model_version_status"] = [_version("LOADING", "FAILED_PRECONDITION")]
        return states

    async def reload(self) -> tuple[int, dict[str, Any]]:
        """What POST /v1/config/reload answers."""
        async with self._turn:
            try:
                digest = self._digest()
            except OSError:
                return 500, {"error": "Config file not found or cannot open."}
            if digest == self._loaded and not self._failed:
                return 200, await self._statuses()
            self._loaded = digest
            self._pass_on()
            async with self._ask("POST", "/v1/config/reload") as answer:
                await answer.read()
                self._failed = answer.status >= 400
            if self._failed:
                log("modelmanager", "error", f"Reloading the configuration failed: {(await answer.text())[:2000]}")
                return 412, {"error": "Reloading config file failed. Check server logs for more info."}
            log("modelmanager", "info", "Configuration reloaded")
            return 201, await self._statuses()

    async def poll(self) -> None:
        """Look at config.json from time to time."""
        seconds = self._options.file_system_poll_wait_seconds
        while seconds > 0:
            await asyncio.sleep(seconds)
            try:
                changed = self._digest() != self._loaded
            except OSError:
                continue
            if changed:
                await self.reload()

    async def _status(self, _request: web.Request) -> web.Response:
        return web.json_response(await self._statuses())

    async def _reload(self, _request: web.Request) -> web.Response:
        status, shape = await self.reload()
        return web.json_response(shape, status=status)

    # Everything else

    def _ask(self, method: str, path: str, **more: Any) -> Any:
        assert self._session is not None
        headers = {**more.pop("headers", {}), "Authorization": f"Bearer {KEY}"}
        return self._session.request(method, path, headers=headers, **more)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if self._key and request.headers.get("Authorization") != f"Bearer {self._key}":
            return web.json_response({"error": "Unauthorized request due to invalid or missing api-key"}, status=500)
        return await self._forward(request)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        body = await request.read()
        async with self._ask(request.method, request.raw_path, headers=headers, data=body) as answer:
            if answer.status >= 400:
                return _refusal(answer.status, await answer.read())
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for block in answer.content.iter_any():
                await response.write(block)
            await response.write_eof()
            return response


def _version(state: str, code: str) -> dict[str, Any]:
    return {"version": "1", "state": state, "status": {"error_code": code, "error_message": code}}


def _refusal(status: int, body: bytes) -> web.Response:
    """An error as the real one words it."""
    if status == 404:
        return web.json_response({"error": "Mediapipe graph definition with requested name is not found"}, status=404)
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body.decode("utf-8", "replace")
    text = f"Mediapipe execution failed. MP status - INVALID_ARGUMENT: {message}"
    return web.json_response({"error": text}, status=503 if status == 503 else 400)


async def _serve(options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = _Server(options)
    async with server.running():
        runner = web.AppRunner(server.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        polling = asyncio.create_task(server.poll())
        try:
            await web.TCPSite(runner, options.rest_bind_address, options.rest_port).start()
            log("serving", "info", f"Started REST server at {options.rest_bind_address}:{options.rest_port}")
            await stop.wait()
        finally:
            polling.cancel()
            await runner.cleanup()


def main(arguments: list[str], version: str = VERSION) -> int:
    """Be ovms. Returns the exit status."""
    options = parse(arguments)
    if options.version:
        sys.stdout.write(f"OpenVINO Model Server {version}.0123456789ab\nOpenVINO backend {version}-1-0123456789a\n")
        return 0
    log("serving", "info", f"OpenVINO Model Server {version}.0123456789ab")
    if not options.rest_port or not Path(options.config_path).is_file():
        log("modelmanager", "error", "Couldn't start model manager")
        return 1
    try:
        asyncio.run(_serve(options))
    except OSError as error:
        log("serving", "error", f"Failed to start REST server: {error}")
        return 1
    return 0
