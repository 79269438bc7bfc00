"""An engine that chats; the name of the model selects its answer."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import BadGatewayError, InvalidRequestError, ModelNotFoundError

from .fake_engine import FakeEngine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

NASTY = "\x1b]0;title\x07"


class ChattingEngine(FakeEngine):
    """Journals every request and every abandoned answer."""

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        self._log(f"{service} {json.dumps(request)}")
        native = self.manifest.service(service).native
        # Closed here: a generator that a traceback still refers to would end later.
        async with aclosing(self._native(request) if native else self._events(request)) as events:
            yield events

    async def _events(self, request: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        model, prompt = request["model"], request["messages"][-1]["content"]
        if model == "absent":
            raise ModelNotFoundError("model: no model is called 'absent'. Pull it: engine-plugin models pull absent")
        if model == "thinker":
            for thought in ("Let me", " see."):
                yield _event({"reasoning_content": thought})
            yield _event({"content": f"\n\nI thought{NASTY} of: {prompt}"})
        elif model == "endless":
            try:
                while True:
                    yield _event({"content": "more "})
                    await asyncio.sleep(0.01)
            finally:
                self._log("the answer was cut short")
        elif model == "breaking":
            yield _event({"content": "So far"})
            raise BadGatewayError("the engine broke off")
        elif model == "silent":
            try:
                await asyncio.Event().wait()
            finally:
                self._log("the silence was broken")
        else:
            yield _event({"content": f"{len(request['messages'])}: {prompt}" if isinstance(prompt, str) else "seen"})
        yield _event({}, "length" if request.get("max_tokens") == 1 else "stop")
        yield b"data: [DONE]\n\n"

    async def _native(self, request: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        if request["model"] == "failing":
            yield b'data: {"error": "the runner has died"}\n\n'
            return
        message = request["messages"][-1]
        said = f"native: {message['content']}, {len(message.get('images', ()))} pictures"
        for part in ({"thinking": "Hm."}, {"content": said}):
            yield b"data: %s\n\n" % json.dumps({"message": {"role": "assistant"} | part, "done": False}).encode()
        last = {"message": {"role": "assistant", "content": "!"}, "done": True, "done_reason": "stop"}
        yield b"data: %s\n\n" % json.dumps(last).encode()

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        if request.get("stream"):
            raise InvalidRequestError("stream: a call has none")
        self._log(f"{service} {json.dumps(request)}")
        message = {"role": "assistant", "content": "whole"}
        return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()


def _event(delta: dict[str, str], finish: str | None = None) -> bytes:
    return b"data: %s\n\n" % json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]}).encode()
