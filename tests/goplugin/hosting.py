"""The host's side, for the tests: starts a plugin as go-plugin does and calls it over the address it announces."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import grpc
import grpc.aio
from google.protobuf import empty_pb2

from engine_plugin.protocol.stubs import provider_pb2
from engine_plugin.protocol.stubs.goplugin import controller_pb2, stdio_pb2
from engine_plugin.rpc.choice import use_grpcio
from engine_plugin.system.certificates import Identity, der_to_pem
from tests.patience import LIMIT, pace, within

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from google.protobuf.message import Message

ROOT = Path(__file__).resolve().parents[2]


def environ(**changes: str) -> dict[str, str]:
    """Return this environment with the variables that a host sets, and `changes`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PLUGIN_", "ENGINE_PLUGIN_"))}
    base = kept | {"ENGINE_PLUGIN_GRPC": "grpcio" if use_grpcio() else "native"}
    base |= {"AOG_PLUGIN": "aog-provider-plugin-v1", "PLUGIN_PROTOCOL_VERSIONS": "1", "PYTHONPATH": str(ROOT)}
    base |= {"PLUGIN_MIN_PORT": "10000", "PLUGIN_MAX_PORT": "25000", "TEST_PACE": str(pace(0.6))}
    return base | changes


class Hosted:
    """A started process. `line` is its first line on stdout, without the newline; `log` grows with stderr."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.line = ""
        self.log: list[dict[str, Any]] = []
        self.plain: list[str] = []
        self._grown = asyncio.Event()
        self._stderr = asyncio.create_task(self._read_stderr())
        self._channel: grpc.aio.Channel | None = None
        self.identity: Identity | None = None

    @classmethod
    async def start(cls, module: str = "tests.goplugin.plugin", *, tls: bool = False, **changes: str) -> Hosted:
        identity = Identity.create() if tls else None
        if identity is not None:
            changes["PLUGIN_CLIENT_CERT"] = identity.certificate_pem.decode()
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, stdout=pipe, stderr=pipe, stdin=pipe, env=environ(**changes), cwd=ROOT
        )
        hosted = cls(process)
        hosted.identity = identity
        return hosted

    async def announced(self) -> Hosted:
        """Wait for the handshake line."""
        assert self.process.stdout is not None
        self.line = (await within(self.process.stdout.readline())).decode().rstrip("\n")
        assert self.line, self.plain or self.log
        return self

    @property
    def address(self) -> str:
        return self.line.split("|")[3]

    @property
    def certificate(self) -> bytes:
        """The sixth field, as a host reads it: base64 that must not be padded."""
        text = self.line.split("|")[5]
        assert "=" not in text
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)

    @property
    def channel(self) -> grpc.aio.Channel:
        if self._channel is None:
            unix = self.line.split("|")[2] == "unix"
            target = "unix:" + quote(self.address) if unix else self.address
            options: list[tuple[str, Any]] = [
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
            ]
            if self.identity is None:
                self._channel = grpc.aio.insecure_channel(target, options=options)
            else:
                identity, trusted = self.identity, der_to_pem(self.certificate)
                credentials = grpc.ssl_channel_credentials(trusted, identity.key_pem(), identity.certificate_pem)
                options.append(("grpc.ssl_target_name_override", "localhost"))
                self._channel = grpc.aio.secure_channel(target, credentials, options=options)
        return self._channel

    async def call(self, path: str, request: Message, answer: type[Message]) -> Any:
        method = self.channel.unary_unary(
            path, request_serializer=type(request).SerializeToString, response_deserializer=answer.FromString
        )
        return await method(request, timeout=LIMIT)

    async def do(self, action: str, argument: object = None, padding: str = "") -> Any:
        """Have the plugin do `action` within itself; see tests.goplugin.plugin."""
        data = json.dumps(argument).encode()
        request = provider_pb2.InvokeServiceRequest(service_name=action, request_data=data, auth_info=padding)
        path = "/protocol.ProviderService/InvokeService"
        return json.loads((await self.call(path, request, provider_pb2.InvokeServiceResponse)).response_data)

    async def shutdown(self) -> None:
        await self.call("/plugin.GRPCController/Shutdown", controller_pb2.Empty(), controller_pb2.Empty)

    async def printed(self) -> AsyncIterator[stdio_pb2.StdioData]:
        """Return the output that the plugin streams by StreamStdio."""
        method = self.channel.unary_stream(
            "/plugin.GRPCStdio/StreamStdio",
            request_serializer=empty_pb2.Empty.SerializeToString,
            response_deserializer=stdio_pb2.StdioData.FromString,
        )
        async for data in method(empty_pb2.Empty(), timeout=LIMIT):
            yield data

    async def printed_until(self, end: bytes) -> bytes:
        """Return the streamed output up to and including `end`, and check the form of each message."""
        text = bytearray()
        async for data in self.printed():
            assert data.channel == stdio_pb2.StdioData.STDOUT
            assert 1 <= len(data.data) <= 1024
            text += data.data
            if text.find(end, -len(data.data) - len(end)) >= 0:
                break
        return bytes(text)

    async def logged(self, text: str) -> dict[str, Any]:
        """Wait for a log line whose message holds `text`."""
        while not (found := [line for line in self.log if text in line["@message"]]):
            self._grown.clear()
            await within(self._grown.wait())
        return found[0]

    async def ended(self) -> int:
        """Wait until the process has ended and its stdout and stderr are closed, as a host does."""
        assert self.process.stdout is not None
        code = await within(self.process.wait())
        await within(self._stderr)
        rest = await within(self.process.stdout.read())
        assert rest == b"", "only the handshake line may reach the real stdout"
        return code

    async def close(self) -> None:
        """Close all resources."""
        if self._channel is not None:
            await self._channel.close()
        if self.process.returncode is None:
            self.process.kill()
        await self.ended()

    async def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            if line.startswith(b"{"):
                self.log.append(json.loads(line))
            else:
                self.plain.append(line.decode())
            self._grown.set()
        self._grown.set()


def names(directory: Path) -> list[str]:
    """What is in a directory."""
    return sorted(path.name for path in directory.iterdir())


async def end_without_reader(socket_dir: Path, **variables: str) -> int:
    """Start the plugin with a standard output that has no reader; the status with which it exits."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    nowhere = asyncio.subprocess.DEVNULL
    try:
        plugin = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.goplugin.plugin"),
            stdin=nowhere,
            stdout=write_end,
            stderr=nowhere,
            env=environ(PLUGIN_UNIX_SOCKET_DIR=str(socket_dir), **variables),
            cwd=ROOT,
        )
    finally:
        os.close(write_end)
    try:
        return await within(plugin.wait())
    finally:
        if plugin.returncode is None:
            plugin.kill()
            await plugin.wait()
