"""Random input at the plugin's socket: every method, with any bytes, ended at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import secrets
import socket
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

from engine_plugin.manifest import load_manifest
from engine_plugin.plugin import Plugin
from engine_plugin.protocol.stubs import provider_pb2 as pb
from engine_plugin.protocol.stubs.standard import health_pb2
from engine_plugin.server import new_server
from engine_plugin.server.servicer import provider_service
from tests.examples import MORE
from tests.host.conftest import sockets as sockets  # noqa: PLC0414  # a fixture
from tests.patience import LIMIT
from tests.shipped import shipped, write_manifest
from tests.small_engine import SmallEngine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from google.protobuf.descriptor import MethodDescriptor
    from google.protobuf.message import Message

SERVICE = pb.DESCRIPTOR.services_by_name["ProviderService"]
METHODS = list(SERVICE.methods)
CODES = {0, 200, 400, 404, 412, 501, 503}
"""Codes that a plugin with a correct engine may return; 500 would be a fault of the plugin."""

CALLS = MORE or 1200
TOGETHER = 12
TEXTS = [
    "",
    "chat",
    "embed",
    "rerank",
    "speech-to-text-ws",
    "generate",
    "Chat ",
    "../..",
    "\0",
    "é\u202e",
    "x" * 70_000,
]
REQUESTS = [
    *(b"", b"{}", b"[]", b"null", b"\xff\xfe", b"{" * 3000, b'{"model":"small"}', b'{"models":["a","a"]}'),
    *(b'{"messages":[{"role":"user"}]}', b'{"input":[]}', b'{"input":[1]}', b'{"query":"a","documents":["b"]}'),
    *(b'{"model":"a","messages":[1]}', b'{"model":{"a":' + b"[" * 200 + b"]" * 200 + b"}}", b'{"model":NaN}'),
    *(b'{"model":"http://[/x.gguf"}', b'{"name":"\\ud800"}', b'{"model":"a","password":1}', b'{"models":[1e999]}'),
]
BIG = b'{"messages":[{"role":"user","content":"' + b"x" * 5_000_000 + b'"}]}'


class SteadyEngine(SmallEngine):
    """A SmallEngine that does not do what its request says."""

    @contextlib.asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        async with super().stream(service, {"model": request["model"], "chunks": 3}) as chunks:
            yield chunks

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        return await super().call(service, {"model": request["model"]})


@pytest.fixture
async def address(tmp_path: Path, sockets: Path) -> AsyncIterator[str]:
    """Where a plugin is served whose services are of every kind."""
    shape = shipped("llamacpp")
    speech = shape["services"][0] | {"service_name": "speech-to-text-ws", "expose_protocol": "WEBSOCKET"}
    speech["config_ref"] = ""
    speech["capabilities"] = {"support_streaming": True, "support_bidirectional": True}
    shape["services"].append(speech)
    shape["resources"]["data_dir"] = str(tmp_path / "data")
    write_manifest(tmp_path, shape)
    manifest = load_manifest(tmp_path / "plugin.yaml")
    server = new_server()
    server.add(provider_service(Plugin(manifest, SteadyEngine(manifest))))
    try:
        yield await server.start(f"unix:{sockets / 's'}" if sys.platform != "win32" else "127.0.0.1:0")
    finally:
        await server.stop(0)


# Messages


def value_of(chance: random.Random, of: Any) -> Any:
    if of.type == FieldDescriptor.TYPE_STRING:
        return chance.choice(TEXTS)
    if of.type == FieldDescriptor.TYPE_BYTES:
        return chance.choice(REQUESTS) if chance.random() < 0.9 else chance.randbytes(chance.randrange(200))
    if of.type == FieldDescriptor.TYPE_BOOL:
        return chance.random() < 0.5
    return chance.choice([0, 1, 2, 3, -1, 2**31 - 1, -(2**31)])


def random_message(chance: random.Random, kind: type[Message]) -> Message:
    """A message whose fields hold something a host might send, or something else."""
    message = kind()
    for of in kind.DESCRIPTOR.fields:
        if of.message_type is not None:  # a map
            getattr(message, of.name).update({chance.choice(TEXTS): chance.choice(TEXTS) for _ in range(2)})
        elif chance.random() < 0.9:
            setattr(message, of.name, value_of(chance, of))
    return message


def random_bytes(chance: random.Random, method: MethodDescriptor) -> bytes:
    """What is sent as a message: well formed, with unknown fields, damaged, or no message at all."""
    kind = GetMessageClass(method.input_type)
    data = random_message(chance, kind).SerializeToString()
    match chance.randrange(8):
        case 0:
            return chance.randbytes(chance.randrange(64))
        case 1:  # unknown fields of each wire type, and a group
            return (
                data
                + b"\xc0\x3e\x05"
                + b"\xc2\x3e\x03abc"
                + b"\xc5\x3e1234"
                + b"\xc1\x3e12345678"
                + b"\xc3\x3e\xc4\x3e"
            )
        case 2:
            at = chance.randrange(len(data) + 1)
            return data[:at] + chance.randbytes(chance.randrange(1, 4)) + data[at + chance.randrange(3) :]
        case 3:
            return data[: chance.randrange(len(data) + 1)]
        case 4:
            return b"\x0a\x03\xff\xfe\xfd"  # field 1, a text that is no UTF-8
        case 5 if chance.random() < 0.05:
            return b"\x0a\x04chat\x12" + varint(len(BIG)) + BIG
    return data


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


# Calls

ALLOWED: dict[str, list[grpc.StatusCode]] = {
    "end": [],
    "at once": [grpc.StatusCode.CANCELLED],
    "soon": [grpc.StatusCode.CANCELLED],
    "first answer": [grpc.StatusCode.CANCELLED],
    "deadline": [grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED],
}
"""The moments at which a call is left, and how it may end then. What is no message has a status of its own."""


@dataclass
class Tally:
    """What came of the calls, so that it can be seen that all kinds of end were met."""

    answers: Counter[int] = field(default_factory=Counter)
    statuses: Counter[grpc.StatusCode] = field(default_factory=Counter)


class Attempt:
    """One call, with its own randomness."""

    def __init__(self, channel: grpc.aio.Channel, seed: str, tally: Tally) -> None:
        self.chance = random.Random(seed)  # noqa: S311  # to be repeated, not to be secret
        self.method: MethodDescriptor = self.chance.choice(METHODS)
        self.sent = [random_bytes(self.chance, self.method) for _ in range(self.chance.randrange(4))]
        self.moment = self.chance.choice(["end", "end", *ALLOWED])
        self._channel: Any = channel  # grpcio's types know of no channel that carries bytes
        self._tally = tally
        self._response = GetMessageClass(self.method.output_type)

    def __str__(self) -> str:
        return f"{self.method.name}, left at: {self.moment}, sent: {[data[:300] for data in self.sent]}"

    async def run(self) -> None:
        timeout = self.chance.choice([0.0001, 0.001, 0.01]) if self.moment == "deadline" else LIMIT
        call = self._begin(timeout)
        allowed = {grpc.StatusCode.INVALID_ARGUMENT, *ALLOWED[self.moment]}
        try:
            if self.moment == "at once":
                call.cancel()
            elif self.moment == "soon":
                asyncio.get_running_loop().call_later(self.chance.random() * 0.01, call.cancel)
            await self._read(call)
        except grpc.aio.AioRpcError as error:
            status, details = error.code(), error.details() or ""
        except asyncio.CancelledError:
            status, details = grpc.StatusCode.CANCELLED, ""
        else:
            return
        if details == "Internal error from Core" and self.method.client_streaming:
            return  # what grpcio's client says when it writes to a call that has ended
        self._tally.statuses[status] += 1
        assert status in allowed, f"{status}: {details}"
        assert "Traceback" not in details

    def _begin(self, timeout: float) -> Any:
        path = f"/{SERVICE.full_name}/{self.method.name}"
        if self.method.client_streaming:
            return self._channel.stream_stream(path)(self._several(), timeout=timeout)
        request = self.sent[0] if self.sent else b""
        if self.method.server_streaming:
            return self._channel.unary_stream(path)(request, timeout=timeout)
        return self._channel.unary_unary(path)(request, timeout=timeout)

    async def _several(self) -> AsyncIterator[bytes]:
        for data in self.sent:
            yield data
            await asyncio.sleep(self.chance.random() * 0.003)

    async def _read(self, call: Any) -> None:
        if not self.method.server_streaming:
            self._judge(await call)
            return
        async for answer in call:
            self._judge(answer)
            if self.moment == "first answer":
                call.cancel()
        assert await call.code() is grpc.StatusCode.OK

    def _judge(self, answer: bytes) -> None:
        response: Any = self._response.FromString(answer)
        if "code" in self._response.DESCRIPTOR.fields_by_name:
            self._tally.answers[response.code] += 1
            assert response.code in CODES, response
            assert len(response.message) < 2000, "a message repeats what was sent"
        if "response_data" in self._response.DESCRIPTOR.fields_by_name and response.code == 200:
            assert isinstance(json.loads(response.response_data), dict)


async def healthy(channel: grpc.aio.Channel) -> bool:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    answer = await check(health_pb2.HealthCheckRequest(service="plugin"), timeout=LIMIT)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def in_groups(attempts: Iterable[tuple[str, Attempt]]) -> None:
    """Run attempts, some at a time; the first that goes wrong says how to repeat it."""
    room = asyncio.Semaphore(TOGETHER)
    wrong: list[Exception] = []

    async def one(seed: str, attempt: Attempt) -> None:
        try:
            async with asyncio.timeout(2 * LIMIT):
                await attempt.run()
        except Exception as error:  # noqa: BLE001  # raised below
            error.add_note(f"ABUSE_SEED={seed}: {attempt}")
            wrong.append(error)
        finally:
            room.release()

    async with asyncio.TaskGroup() as group:
        for seed, attempt in attempts:
            await room.acquire()
            if wrong:
                break
            group.create_task(one(seed, attempt))
    if wrong:
        raise wrong[0]


def running() -> Counter[str]:
    """How many tasks there are of each kind; grpcio replaces those that wait for calls."""
    return Counter(getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())


async def tasks_end(known: Counter[str]) -> None:
    """Wait until there are no more tasks than those."""
    async with asyncio.timeout(LIMIT):
        while running() - known:  # noqa: ASYNC110  # there is no event for it
            await asyncio.sleep(0.01)


@pytest.mark.promise("P24")
async def test_random_calls_are_answered_or_end_with_a_status(address: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each call gets a valid answer or an expected status; then the plugin is healthy, with no task or error left."""
    begin = secrets.token_hex(4) if MORE else "engine"
    only = os.environ.get("ABUSE_SEED")
    tally = Tally()
    async with grpc.aio.insecure_channel(address) as channel:
        assert await healthy(channel)
        known = running()
        seeds = [only] if only else [f"{begin}-{number}" for number in range(CALLS)]
        with caplog.at_level(logging.ERROR):
            await in_groups((seed, Attempt(channel, seed, tally)) for seed in seeds)
        assert await healthy(channel)
        await tasks_end(known)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert set(tally.answers) >= {200, 400, 404, 501}
    assert set(tally.statuses) >= {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


def frames(chance: random.Random) -> bytes:
    """HTTP/2 frames of any type with any content; some say that they are longer than they are."""
    data = PREFACE
    for _ in range(chance.randrange(1, 6)):
        body = chance.randbytes(chance.randrange(40))
        length = len(body) if chance.random() < 0.8 else chance.randrange(2**24)
        head = length.to_bytes(3, "big") + bytes([chance.randrange(12), chance.randrange(256)])
        data += head + chance.randrange(8).to_bytes(4, "big") + body
    return data


def connected(address: str) -> socket.socket:
    if address.startswith("unix:"):
        made = socket.socket(socket.AF_UNIX)
        made.connect(address.removeprefix("unix:"))
        return made
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)))


@pytest.mark.promise("P24")
async def test_connections_without_valid_grpc_do_not_harm_the_plugin(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Another protocol, broken HTTP/2, and connections that are only held open."""
    chance = random.Random("connections")  # noqa: S311  # to be repeated, not to be secret
    open_ones: list[socket.socket] = []
    async with grpc.aio.insecure_channel(address) as channel:
        known = running()
        try:
            for number in range(MORE or 150):
                open_ones.append(connected(address))
                said = [
                    b"GET / HTTP/1.1\r\n\r\n",
                    chance.randbytes(50),
                    PREFACE[: chance.randrange(40)],
                    frames(chance),
                ]
                open_ones[-1].sendall(said[number % len(said)])
                if len(open_ones) > 40:
                    open_ones.pop(0).close()
            assert await healthy(channel)
        finally:
            for one in open_ones:
                one.close()
        await tasks_end(known)
        assert await healthy(channel)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
