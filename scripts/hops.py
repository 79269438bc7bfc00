"""Count the functions and modules of engine_plugin on some ways through a running plugin.

    .venv/bin/python scripts/hops.py            # a table
    .venv/bin/python scripts/hops.py --names    # also the names of the functions

It serves the llama.cpp plugin by gRPC in this process, with the sample models and servers on the loopback interface,
and observes each call by `sys.setprofile`. A function counts once. Functions of the standard library, of dependencies
and of other processes, the generated stubs, lambdas and comprehensions do not count, and neither do coroutines that
only await the one that sends.

pull event     from the function that receives a downloaded chunk to the gRPC message of the progress event; a hop is
               the step from one function to the next
whole pull     from PullModelStream to its end, with the inspection of the model by the engine's software
engine start   from StartEngine to the answer of LoadModel for a model that is not in memory
process start  from EngineProcess.ensure_ready to the readiness of its process: the functions of process/ only
chat chunk     from the engine's bytes to the gRPC message
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import inspect
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc.aio

import engine_plugin
from engine_plugin.app import build
from engine_plugin.manifest import load_manifest
from engine_plugin.protocol.stubs import provider_pb2 as pb
from engine_plugin.server import new_server
from pins import ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from types import CodeType, FrameType

__all__ = ["main"]

PACKAGE = str(Path(engine_plugin.__file__).parent)
SAMPLE = Path(PACKAGE, "samples", "gguf", "tiny-chat.gguf")
SEND = "grpc_aio._AioCall.send"
"""The function that passes a message to gRPC."""
SENDERS = frozenset({"PullModelStream", "InvokeServiceStream", "send"})
"""The coroutines that a message passes through."""
RECEIVE = "data_received"
"""The function that takes bytes from a socket."""
EVENT = "ChunkProgress"
SERVING = "engine_process.EngineProcess._serve"
"""The first function that runs when a process is ready."""


class Way(NamedTuple):
    """What one journey took."""

    title: str
    functions: Sequence[str]
    modules: set[str]


class Recorder:
    """Records the calls of the package's functions, resumptions included, in all threads."""

    def __init__(self) -> None:
        self.calls: list[CodeType] = []
        self.events: list[tuple[int, list[CodeType]]] = []
        """For each progress event: how many calls came before it, and the functions that created it, innermost
        last."""

    def __enter__(self) -> Recorder:
        threading.setprofile(self._call)
        sys.setprofile(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _call(self, frame: FrameType, event: str, _argument: object) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            if not code.co_name.startswith("<") and "stubs" not in code.co_filename:
                self.calls.append(code)
        elif code.co_name == "__init__" and type(frame.f_locals.get("self")).__name__ == EVENT:
            self.events.append((len(self.calls), _creators(frame)))

    def until_sent(self, start: int) -> list[CodeType]:
        """The distinct functions from call number `start` to the next message, less those that merely wait."""
        found: dict[CodeType, None] = {}
        earlier = {code for code in self.calls[:start] if code.co_flags & inspect.CO_COROUTINE}
        for code in self.calls[start:]:
            if code.co_name in SENDERS or code not in earlier:
                found.setdefault(code)
            if _name(code) == SEND:
                return list(found)
        return []


def _creators(frame: FrameType) -> list[CodeType]:
    """The functions up to the coroutine that has the downloaded chunk."""
    codes: list[CodeType] = []
    here = frame.f_back
    while here is not None and here.f_code.co_filename.startswith(PACKAGE):
        codes.append(here.f_code)
        if here.f_code.co_flags & inspect.CO_COROUTINE:
            break
        here = here.f_back
    return codes[::-1]


def _module(code: CodeType) -> str:
    return Path(code.co_filename).relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")


def _name(code: CodeType) -> str:
    return f"{_module(code).rpartition('.')[2]}.{code.co_qualname}"


def _way(title: str, codes: Sequence[CodeType]) -> Way:
    names = [f"{_module(code)}: {code.co_qualname}" for code in dict.fromkeys(codes)]
    return Way(title, names, {_module(code) for code in codes})


def _most_common(ways: Sequence[list[CodeType]]) -> list[CodeType]:
    [(found, _)] = Counter(tuple(way) for way in ways if way).most_common(1)
    return list(found)


@asynccontextmanager
async def _file_server(data: bytes) -> AsyncIterator[str]:
    """The URL of a file that is sent slowly, so that each piece is worth an event."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(data))
        for start in range(0, len(data), len(data) // 6):
            writer.write(data[start : start + len(data) // 6])
            await writer.drain()
            await asyncio.sleep(0.2)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1")
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/pulled.gguf"


class Host:
    """The calls of a host. Raises RuntimeError for an answer that is not a success."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def _method(self, kind: str, rpc: str, answer: str) -> Any:
        make = getattr(self._channel, kind)
        return make(
            f"/protocol.ProviderService/{rpc}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=getattr(pb, answer).FromString,
        )

    async def call(self, rpc: str, request: Any) -> None:
        answer = await self._method("unary_unary", rpc, f"{rpc}Response")(request)
        if answer.code != 200:
            raise RuntimeError(f"{rpc}: {answer.message}")

    async def stream(self, rpc: str, request: Any) -> None:
        async for answer in self._method("unary_stream", rpc, f"{rpc}Response")(request):
            if answer.code not in {0, 200}:
                raise RuntimeError(f"{rpc}: {answer.message}")


@asynccontextmanager
async def _host(data: Path) -> AsyncIterator[Host]:
    built = build(load_manifest(ROOT / "plugins" / "llamacpp" / "plugin.yaml", {"AOG_DATA_DIR": str(data)}))
    server = new_server()
    try:
        for service in built.services:
            server.add(service)
        async with grpc.aio.insecure_channel(await server.start("127.0.0.1:0")) as channel:
            yield Host(channel)
    finally:
        await built.aclose()
        await server.stop(5)


async def _pull(host: Host) -> list[Way]:
    data = await asyncio.to_thread(SAMPLE.read_bytes)
    request = {"model": "pulled", "sha256": hashlib.sha256(data).hexdigest()}
    async with _file_server(data) as url:
        with Recorder() as seen:
            shape = json.dumps({**request, "source": url}).encode()
            await host.stream("PullModelStream", pb.PullModelStreamRequest(request_json=shape))
    ways = [[*creators, *seen.until_sent(start)] for start, creators in seen.events]
    return [_way("pull event", _most_common(ways)), _way("whole pull", seen.calls)]


async def _start(host: Host) -> list[Way]:
    with Recorder() as seen:
        await host.call("StartEngine", pb.StartEngineRequest(mode="cpu"))
        await host.call("LoadModel", pb.LoadModelRequest(request_json=b'{"model": "tiny-chat-gguf"}'))
    names = [_name(code) for code in seen.calls]
    begin, end = names.index("engine_process.EngineProcess.ensure_ready"), names.index(SERVING)
    process = [code for code in seen.calls[begin:end] if _module(code).startswith("process.")]
    return [_way("engine start", seen.calls), _way("process start", process)]


async def _chat(host: Host) -> Way:
    shape = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
    request = pb.InvokeServiceRequest(service_name="chat", request_data=json.dumps(shape).encode())
    ways: list[list[CodeType]] = []
    while len(ways) < 30:  # the sample model is so fast that most answers arrive in one piece
        with Recorder() as seen:
            await host.stream("InvokeServiceStream", request)
        first = next(number for number, code in enumerate(seen.calls) if _name(code) == SEND)
        received = [number for number, code in enumerate(seen.calls) if code.co_name == RECEIVE and number > first]
        ways += [seen.until_sent(start) for start in received]
    # Bytes may come while an earlier message is being sent, which makes a way look shorter.
    counts = Counter(tuple(way) for way in ways if way)
    return _way("chat chunk", max((way for way, count in counts.items() if count * 10 >= len(ways)), key=len))


async def _measure() -> list[Way]:
    with tempfile.TemporaryDirectory(prefix="hops-") as folder:
        async with asyncio.timeout(120), _host(Path(folder)) as host:
            return [*await _pull(host), *await _start(host), await _chat(host)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Count functions and modules on some ways through the plugin.")
    parser.add_argument("--names", action="store_true", help="also print the functions")
    options = parser.parse_args(arguments)
    os.environ.pop("HF_HUB_OFFLINE", None)
    print(f"{'way':14}{'functions':>10}{'hops':>6}{'modules':>9}")
    for way in asyncio.run(_measure()):
        print(f"{way.title:14}{len(way.functions):10}{len(way.functions) - 1:6}{len(way.modules):9}")
        if options.names:
            print("".join(f"    {name}\n" for name in way.functions), end="")


if __name__ == "__main__":
    main()
