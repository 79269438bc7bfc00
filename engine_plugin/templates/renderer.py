"""Renders one model's chat templates in a process, which is killed when it takes too long."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from engine_plugin.process.child import PipedProcess
from engine_plugin.templates.jinja import BROKEN, LIMIT, TemplateError, Templates
from engine_plugin.templates.program import MEMORY, encode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["PROGRAM", "WITHIN", "Renderer"]


PROGRAM = "engine_plugin.templates.program"
"""The module that the process runs."""
WITHIN = 5.0
"""Seconds to render a conversation; the usual time is about a millisecond."""
_START_WITHIN = 60.0
_ANSWER_LIMIT = 256 << 20  # bytes


class Renderer:
    """Renders conversations one at a time. The process starts with the first one, and again after it was killed.

    Owned by the model's server, which awaits `aclose`.
    """

    def __init__(
        self, templates: Templates, argv: Sequence[str], environ: Mapping[str, str], within: float = WITHIN
    ) -> None:
        """`argv` runs PROGRAM; `within` is in seconds."""
        self._templates = templates
        self._argv = argv
        self._environ = environ
        self._within = within
        self._turn = asyncio.Lock()
        self._process: PipedProcess | None = None
        self._rendering: asyncio.Task[str] | None = None

    async def render(
        self, messages: list[Any], tools: list[Any], extra: Mapping[str, Any], *, told: bool = True
    ) -> str:
        """The rendered prompt; empty unless `told`. Raises TemplateError, OSError, and ImportError if Jinja is
        missing.

        A cancelled caller returns at once. Its rendering goes on, within the limits, before the next one.
        """
        await self._turn.acquire()
        self._rendering = asyncio.create_task(self._render([messages, tools, dict(extra), told]))
        self._rendering.add_done_callback(self._done)
        return await asyncio.shield(self._rendering)

    async def aclose(self) -> None:
        """End the process."""
        if self._rendering is not None:
            self._rendering.cancel()
            await asyncio.wait({self._rendering})
        await self._end()

    def kill(self) -> None:
        """Kill the process at once, because the whole program exits. `aclose` need not follow."""
        if self._process is not None:
            self._process.kill_now()

    def _done(self, rendering: asyncio.Task[str]) -> None:
        if not rendering.cancelled():
            rendering.exception()  # the caller may have left
        self._turn.release()

    async def _render(self, conversation: list[Any]) -> str:
        process = await self._started()
        try:
            frame = encode(conversation)
        except RecursionError:
            raise TemplateError(LIMIT, "the conversation is nested too deeply") from None
        answer = await _ask(process, frame, self._within)
        if answer is None or answer.get("kind") == LIMIT:
            await self._end()  # frees what it has allocated
            raise TemplateError(LIMIT, f"rendering it takes more than {self._within:g} s or {MEMORY >> 20} MiB")
        if "prompt" in answer:
            return str(answer["prompt"])
        raise TemplateError(str(answer.get("kind")), str(answer.get("error")))

    async def _started(self) -> PipedProcess:
        process = self._process
        if process is not None and not process.exited.done():
            return process
        await self._end()
        process = PipedProcess()
        await process.spawn(self._argv, self._environ)
        self._process = process
        told = await _ask(process, encode(list(self._templates)), _START_WITHIN)
        if told is None:
            await self._end()
            raise TemplateError(BROKEN, "the process that renders the model's chat template cannot be started")
        if "missing" in told:
            await self._end()
            raise ImportError(told["missing"])
        return process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.kill()


async def _ask(process: PipedProcess, frame: bytes, within: float) -> dict[str, Any] | None:
    """The answer to a frame; None after so many seconds, for a malformed answer, and at the end of the process."""
    process.stdin.write(frame)
    try:
        async with asyncio.timeout(within):
            size = int.from_bytes(await process.output.readexactly(4), "big")
            answer = await process.output.readexactly(size) if size <= _ANSWER_LIMIT else b""
        shape = json.loads(answer.decode("utf-8", "surrogatepass"))
    except (asyncio.IncompleteReadError, TimeoutError, ValueError, RecursionError):
        return None
    return shape if isinstance(shape, dict) else None
