"""A real worker process over its pipes, with a sample model."""

from __future__ import annotations

import asyncio
import os
import pickle
import struct
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError
from engine_plugin.process import guard
from engine_plugin.services import VALIDATORS
from engine_plugin.services.base import optional, words
from engine_plugin.templates.jinja import ChatTemplate, Templates
from openvino_server import chat
from openvino_server.vectors_api import inputs
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

CHECKS: dict[str, Callable[[dict[str, Any]], object]] = {
    "chat": VALIDATORS["chat"].check,
    "complete": VALIDATORS["generate"].check,
    "embed": lambda request: inputs(request.get("input")),
    "rerank": VALIDATORS["rerank"].check,
    "image": VALIDATORS["text-to-image"].check,
    "speak": lambda request: (words({"input": request.get("text")}, "input"), optional(request, "voice", str)),
}
"""How the server checks a request before a worker gets it."""

SAMPLES = Path(__file__).resolve().parents[3] / "engine_plugin/samples/openvino"

PROGRAM = ("-m", "openvino_server.worker")

_LENGTH = struct.Struct(">I")


class WorkerFailed(Exception):  # noqa: N818  # it is what the worker says of itself
    """It could not load its model."""


class CallFailed(Exception):  # noqa: N818  # as above
    """An answer that is an error."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(f"{status} {kind}: {message}")
        self.status, self.kind, self.message = status, kind, message


class Call:
    """What has come for one call."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.parts: list[tuple[int, Any, int, Any, str | None]] = []
        self.progress: list[tuple[int, int]] = []
        self.arrived = asyncio.Event()
        self.result: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def done(self) -> dict[str, Any]:
        return await asyncio.wait_for(self.result, LIMIT)

    async def begun(self) -> None:
        await asyncio.wait_for(self.arrived.wait(), LIMIT)

    def text(self, index: int = 0) -> str:
        return "".join(part[1] for part in self.parts if part[0] == index and isinstance(part[1], str))

    def finish(self, index: int = 0) -> str | None:
        return next((part[4] for part in self.parts if part[0] == index and part[4]), None)


class RunningWorker:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.facts: dict[str, Any] = {}
        self.frames = 0
        self._calls: dict[int, Call] = {}
        self._last = 0
        self._reader: asyncio.Task[None] | None = None

    def send(self, *frame: Any) -> None:
        body = pickle.dumps(frame, protocol=5)
        assert self.process.stdin is not None
        self.process.stdin.write(_LENGTH.pack(len(body)) + body)

    def begin(self, op: str, **request: Any) -> Call:
        self._last += 1
        call = self._calls[self._last] = Call(self._last)
        try:
            if op in CHECKS:
                CHECKS[op](request | (request.get("params") or {}))
            if op == "chat":
                request = self._rendered(**request)
        except InvalidRequestError as error:
            call.result.set_exception(CallFailed(400, "invalid_request_error", str(error)))
        else:
            self.send("do", self._last, {"op": op, "params": {}, **request})
        return call

    def _rendered(self, messages: Any, params: Any = None, **others: Any) -> dict[str, Any]:
        """A conversation as the server renders it for a worker."""
        plain, pictures = chat.messages(messages, "vision" in self.facts["capabilities"])
        tools = chat.tools(others.get("tools"), others.get("tool_choice"))
        extra = (params or {}).get("chat_template_kwargs") or {}
        prompt = ChatTemplate(Templates(*self.facts["templates"])).render(plain, tools.offered, extra)
        called = {"tools": tools.offered, "forced": tools.forced}
        return {"prompt": prompt, "pictures": pictures, "params": params or {}, **called}

    def cancel(self, call: Call) -> None:
        self.send("cancel", call.number)

    async def do(self, op: str, **request: Any) -> dict[str, Any]:
        return await self.begin(op, **request).done()

    async def chat(self, content: Any, **params: Any) -> Call:
        """A whole chat call."""
        extra = {name: params.pop(name) for name in ("tools", "tool_choice") if name in params}
        call = self.begin("chat", messages=[{"role": "user", "content": content}], params=params, **extra)
        call.parts.append((0, "", 0, None, None))
        call.result.add_done_callback(lambda _: None)
        await call.done()
        return call

    async def load(self, kind: str, path: Path, options: dict[str, Any]) -> None:
        settings = {
            "kind": kind,
            "path": str(path),
            "device": "CPU",
            "options": options,
            "threads": 0,
            "cache_dir": "",
        }
        self.send("load", settings)
        verb, what, *_ = await asyncio.wait_for(self._frame(), LIMIT)
        if verb == "failed":
            raise WorkerFailed(what)
        assert verb == "ready"
        self.facts = what
        self._reader = asyncio.create_task(self._read())

    async def _frame(self) -> tuple[Any, ...]:
        assert self.process.stdout is not None
        (length,) = _LENGTH.unpack(await self.process.stdout.readexactly(_LENGTH.size))
        frame: tuple[Any, ...] = pickle.loads(await self.process.stdout.readexactly(length))  # noqa: S301  # ours
        self.frames += 1
        return frame

    async def _read(self) -> None:
        try:
            while True:
                self._take(await self._frame())
        except asyncio.IncompleteReadError:
            for call in self._calls.values():
                if not call.result.done():
                    call.result.set_exception(EOFError("the worker has ended"))

    def _take(self, frame: tuple[Any, ...]) -> None:
        match frame:
            case ("part", pairs):
                for number, payload in pairs:
                    call = self._calls[number]
                    for item in payload:
                        (call.progress if len(item) == 2 else call.parts).append(item)
                    call.arrived.set()
            case ("done", number, payload):
                self._calls[number].result.set_result(payload)
            case ("error", number, status, kind, message):
                self._calls[number].result.set_exception(CallFailed(status, kind, message))
            case _:
                raise AssertionError(frame)

    async def aclose(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait({self._reader})
        if self.process.returncode is None:
            self.process.kill()
        await asyncio.wait_for(self.process.communicate(), LIMIT)  # closes its pipes, too


@asynccontextmanager
async def worker(
    kind: str, path: Path, *, program: tuple[str, ...] = PROGRAM, **options: Any
) -> AsyncIterator[RunningWorker]:
    """A worker, `program`, that has loaded a model. Raises WorkerFailed."""
    running = RunningWorker(
        await asyncio.create_subprocess_exec(
            sys.executable,
            *program,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, guard.PARENT_VARIABLE: str(os.getpid())},
            limit=1 << 24,
        )
    )
    try:
        await running.load(kind, path, options)
        yield running
    finally:
        await running.aclose()
