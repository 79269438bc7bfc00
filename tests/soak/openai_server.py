"""A server with OpenAI's REST API for the soak: `python -m tests.soak.openai_server PORT` prints its port.

Models called `fault-…` behave as they are called; what is asked for with `count N` is answered with so many words.
Ends when its stdin does. `/contract/requests` tells what goes on, as at tests/engines/ollama/contract.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.engines.ollama.contract import words
from tests.engines.openai.contract import Contract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["FAULTS", "GOOD"]

GOOD = ("gpt-x", "slow", "burst")
FAULTS = {
    "fault-400": 400,
    "fault-429": 503,
    "fault-500": 502,
    "fault-503": 503,
    "fault-504": 408,
    "fault-cut": 502,
    "fault-no-done": 502,
    "fault-error": 502,
}
"""Models that fail, and the error code of the call."""

_MODELS = (*GOOD, *FAULTS, "fault-stall", "fault-silent", "fault-endless")
_SLOW = 0.05
_BEFORE = 2


class Server(Contract):
    """A gateway with distinguishable texts."""

    def __init__(self) -> None:
        super().__init__("gateway")
        self.models += [{"id": name, "object": "model", "owned_by": "us"} for name in _MODELS if name != "gpt-x"]
        self._open: list[dict[str, Any]] = []

    async def _face(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/contract/requests":
            return web.json_response(self._open)
        if request.path.startswith("/contract/"):
            return web.Response()
        entry = {"path": request.path, "body": None}
        if request.content_type == "application/json" and request.can_read_body:
            entry["body"] = await request.json()
        self._open.append(entry)
        try:
            return await super()._face(request)
        finally:
            self._open.remove(entry)
            del self.bodies[:], self.heads[:], self.paths[:], self.forms[:]

    async def _chat(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await self._told(
            request, body, body["messages"][-1]["content"], lambda word: {"delta": {"content": word}}
        )

    async def _completion(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await self._told(request, body, body["prompt"], lambda word: {"text": word})

    async def _told(self, request: web.Request, body: dict[str, Any], prompt: str, part: Any) -> web.StreamResponse:
        model = body["model"]
        status = model.removeprefix("fault-")
        if status.isdigit():
            return web.json_response({"error": {"message": "no", "type": "x"}}, status=int(status))
        if model == "fault-silent":
            await asyncio.Event().wait()
        said = words.pieces(words.answer(prompt))
        if not body.get("stream") and not model.startswith("fault-"):
            return self._whole(body, "".join(said), part)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        async for word in _hurt(request, model, said):
            choice = {"index": 0, "finish_reason": None, **part(word)}
            await response.write(_event({"object": "chunk", "choices": [choice]}))
        if model == "fault-error":
            await response.write(_event({"error": {"message": "lost", "code": 500}}))
        elif model != "fault-no-done":
            last = {"index": 0, **part(""), "finish_reason": "stop"}
            await response.write(_event({"object": "chunk", "choices": [last]}) + b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    @staticmethod
    def _whole(body: dict[str, Any], text: str, part: Any) -> web.StreamResponse:
        choice = part(text)
        if "delta" in choice:
            choice = {"message": {"role": "assistant", "content": text}}
        choices = [{"index": 0, **choice, "finish_reason": "stop"}]
        return web.json_response({"id": "x", "object": "x", "created": 1, "model": body["model"], "choices": choices})


async def _hurt(request: web.Request, model: str, said: list[str]) -> AsyncIterator[str]:
    """The words, with what befalls them."""
    for number, word in enumerate(said):
        if model == "slow":
            await asyncio.sleep(_SLOW)
        if number == _BEFORE and model == "fault-cut" and request.transport is not None:
            request.transport.abort()
        if number == _BEFORE and model == "fault-stall":
            await asyncio.Event().wait()
        yield word
    while model == "fault-endless":
        yield " more"
        await asyncio.sleep(0.002)


def _event(shape: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(shape).encode() + b"\n\n"


async def _serve(port: int) -> None:
    server = Server()
    await server.start(port)
    print(server.port, flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
