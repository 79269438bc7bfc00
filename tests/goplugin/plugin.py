"""A hosted plugin for the tests, run as `python -m tests.goplugin.plugin`.

It serves ProviderService, of which it answers InvokeService alone: the request's service name says what to do
inside the plugin. TEST_LOAD and TEST_ACLOSE say how loading and closing go; with TEST_EARLY it announces itself
before it loads, and with `orphan` lets its host die in between; TEST_PACE is what the time limits of its end are
multiplied by.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from engine_plugin.goplugin.early import announce_early
from engine_plugin.goplugin.serve import run
from engine_plugin.protocol.handshake import COOKIE
from engine_plugin.server.seam import HostedPlugin

if TYPE_CHECKING:
    from engine_plugin.server.seam import Call


def hold_the_loop(seconds: float) -> None:
    time.sleep(seconds)


def refuse_threads() -> None:
    """Make the creation of threads fail, as a full pids cgroup or an address space limit does."""

    def refuse(*_args: object, **_more: object) -> int:
        raise RuntimeError("can't start new thread")

    for name in ("_start_new_thread", "_start_joinable_thread"):
        if hasattr(threading, name):
            setattr(threading, name, refuse)


def make_noise() -> None:
    print("noise before the handshake")
    os.write(1, b"x" * 100_000)
    subprocess.run([sys.executable, "-c", "print('noise of a child')"], check=True)


class Provider:
    """Answers every rpc; InvokeService does what its request names."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._unused

    async def _unused(self, *_args: Any) -> None:
        raise AssertionError("not called by these tests")

    async def InvokeService(self, request: Any, _call: Call) -> Any:  # noqa: N802 - the rpc's own name
        from engine_plugin.protocol.stubs import provider_pb2

        action = getattr(self, f"_do_{request.service_name}")
        answer = action(json.loads(request.request_data or b"null"))
        if asyncio.iscoroutine(answer):
            answer = await answer
        return provider_pb2.InvokeServiceResponse(response_data=json.dumps(answer).encode())

    def _do_print(self, text: str) -> None:
        print(text)

    def _do_flood(self, sizes: list[int]) -> None:
        for size in sizes:
            data = b"x" * (size - 1) + b"\n"
            while data:
                data = data[os.write(1, data) :]

    def _do_child(self, command: list[str]) -> int:
        return subprocess.Popen(command, start_new_session=True).pid

    def _do_log(self, text: str) -> None:
        logging.getLogger("test").warning(text)

    def _do_interrupt_handling(self, _: None) -> str:
        command = [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT))"]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

    def _do_echo(self, size: int) -> str:
        return "y" * size

    async def _do_wait(self, _: None) -> None:
        await asyncio.Event().wait()

    def _do_block(self, seconds: float) -> None:
        hold_the_loop(seconds)

    def _do_refuse_threads(self, _: None) -> None:
        refuse_threads()

    def _do_executor(self, seconds: float) -> None:
        asyncio.get_running_loop().run_in_executor(None, time.sleep, seconds)


async def aclose() -> None:
    """Close as TEST_ACLOSE says."""
    match os.environ.get("TEST_ACLOSE"):
        case "error":
            raise OSError("the engine would not stop")
        case "hang":
            await asyncio.Event().wait()
        case "swallow":
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    continue
        case "block":
            hold_the_loop(1000)
    logging.getLogger("test").info("closed")


def set_pace(factor: float) -> None:
    from engine_plugin.goplugin import session

    for name in ("_STOP_LIMIT", "_END_LIMIT"):
        setattr(session, name, getattr(session, name) * factor)


async def load() -> HostedPlugin:
    from engine_plugin.errors import EngineNotInstalledError

    set_pace(float(os.environ.get("TEST_PACE", "1")))
    match os.environ.get("TEST_LOAD"):
        case "refuse":
            raise EngineNotInstalledError("the engine is not installed. Run: engine-plugin install")
        case "crash":
            raise ZeroDivisionError("a bug")
        case "hang":
            logging.getLogger("test").info("loading")
            await asyncio.Event().wait()
        case "stdin":
            logging.getLogger("test").info("loading")
            sys.stdin.readline()  # holds the loop, as imports do
        case "print":
            make_noise()
        case "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
    from engine_plugin.protocol.stubs import provider_pb2
    from engine_plugin.server.seam import RpcService

    service = RpcService(provider_pb2.DESCRIPTOR.services_by_name["ProviderService"], Provider())
    return HostedPlugin((service,), aclose)


if __name__ == "__main__":
    host = os.getppid()
    early = announce_early(os.environ) if os.environ.get("TEST_EARLY") else None
    try:
        while os.environ.get("TEST_EARLY") == "orphan" and os.getppid() == host:
            time.sleep(0.01)
        sys.exit(run(load, COOKIE, early))
    finally:
        if early is not None:
            early.close()
