"""Concurrent calls, each abandoned at a random moment; the answers are checked to the last token."""

from __future__ import annotations

import asyncio
import random
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import EnginePluginError, PluginProcessError
from engine_plugin.host import connect
from engine_plugin.waiting import comes_true
from tests.patience import patience
from tests.soak.rig import CHAT_MODELS, FLOOD

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine

    from engine_plugin.host import ChunkStream, PluginClient
    from tests.soak.rig import Rig
    from tests.soak.tally import Tally

__all__ = ["BROKEN", "LATE", "Load"]

BROKEN = (502, 503)
"""What a call may end with while engines die and are stopped."""
LATE = 408

_LIMIT = patience(7.5)  # seconds, in which any call must have ended, one way or another
_QUESTIONS = ("list_models", "health_check", "running_models", "get_operate_status", "get_config", "check_engine")
_WORD = re.compile(rb'"content": "w(\d+) "')
_DONE = b"data: [DONE]"
_FLOOD_TOKENS = 8000  # more than all buffers on the way hold
_SLOW = 3.0  # seconds

WAYS = {
    "whole": 46,
    "task": 8,
    "before": 12,
    "middle": 16,
    "end": 5,
    "deadline": 12,
    "slow": 1,
}
"""How a stream ends, and how often in a hundred. All but `whole` and `deadline` are left by the client: by the end
of its task, before the first chunk, in the middle, after the last token, or as a reader that is far behind."""


class Load:
    """Runs until `over` is set. One for each phase of a soak."""

    def __init__(self, rig: Rig, tally: Tally, seed: str, longest: int) -> None:
        """`longest`: tokens of the longest stream."""
        self.over = asyncio.Event()
        self._rig = rig
        self._tally = tally
        self._seed = seed
        self._longest = longest
        self._numbers = 0

    def workers(self, streams: int) -> list[Coroutine[Any, Any, None]]:
        """What to run: as many streams at once, and the other calls beside them."""
        calls: list[Coroutine[Any, Any, None]] = [self._streams(number) for number in range(streams)]
        calls += [self._calls(number) for number in range(max(2, streams // 40))]
        calls += [self._channels()]
        return calls

    async def pause(self, seconds: float) -> bool:
        """Wait; True when the load is over."""
        return await comes_true(self.over.wait(), within=seconds)

    def chance(self, who: object) -> random.Random:
        """Return a generator for one caller, so that its choices do not depend on the order of callers."""
        return random.Random(f"{self._seed} {who}")  # noqa: S311  # chance that can be repeated is what is wanted

    async def _bounded(self, what: str, call: Awaitable[None], allowed: tuple[int, ...]) -> bool:
        """One call to its end. False when it ended with an error."""
        try:
            async with asyncio.timeout(_LIMIT):
                await call
        except TimeoutError:
            self._tally.surprise(f"{what}: had not ended after {_LIMIT:g} s")
            if not self._tally.waited_for:
                self._tally.waited_for = await self._rig.where()
        except EnginePluginError as error:
            self._tally.failed(what, error, allowed)
        else:
            return True
        return False

    # Streams

    async def _streams(self, number: int) -> None:
        """One stream after the other."""
        chance = self.chance(f"stream {number}")
        await self.pause(chance.uniform(0, 1))
        while not self.over.is_set():
            way = chance.choices(list(WAYS), list(WAYS.values()))[0]
            self._tally.counts["streams begun"] += 1
            allowed = (*BROKEN, LATE) if way == "deadline" else BROKEN
            if not await self._bounded(f"stream, {way}", self._stream(way, chance), allowed):
                await self.pause(chance.uniform(0.05, 0.6))

    async def _stream(self, way: str, chance: random.Random) -> None:
        stream = _Stream(self._tally, self._tag(), chance, FLOOD if way == "slow" else "", self._longest)
        timeout = chance.uniform(0.02, 3.0) if way == "deadline" else None
        chunks = self._rig.client.stream("chat", stream.request, timeout=timeout)
        if way == "task":
            reading = asyncio.ensure_future(stream.read(chunks))
            await asyncio.wait({reading}, timeout=chance.uniform(0, 3))
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading
        elif way == "before":
            async with chunks:
                await asyncio.sleep(chance.choice((0, 0.001, chance.uniform(0, 0.05))))
            self._tally.counts["streams cancelled"] += 1
        else:
            tokens = chance.randint(1, self._longest) if way == "middle" else None
            await stream.read(chunks, leave_after=tokens, at_done=way == "end", slowly=way == "slow")

    def _tag(self) -> str:
        self._numbers += 1
        return f"{self._seed} {self._numbers}"

    # Everything else

    async def _calls(self, number: int) -> None:
        """One unary call after the other."""
        chance = self.chance(f"call {number}")
        while not await self.pause(chance.uniform(0.02, 0.3)):
            self._tally.counts["unary calls"] += 1
            if chance.random() < 0.4:
                name = chance.choice(_QUESTIONS)
                await self._bounded(f"call, {name}", self._ask(name), BROKEN)
            else:
                name = chance.choices(("chat", "generate", "embed", "rerank"), (4, 2, 4, 1))[0]
                await self._bounded(f"call, {name}", self._invoke(name, chance), (*BROKEN, LATE))

    async def _invoke(self, service: str, chance: random.Random) -> None:
        tokens = chance.randint(1, self._longest)
        requests: dict[str, tuple[dict[str, Any], str]] = {
            "chat": ({"messages": _MESSAGES, "max_tokens": tokens, "model": chance.choice(CHAT_MODELS)}, "choices"),
            "generate": ({"prompt": "Once", "max_tokens": tokens, "model": chance.choice(CHAT_MODELS)}, "choices"),
            "embed": ({"input": ["one", "two"]}, "data"),
            "rerank": ({"query": "one", "documents": ["one", "two"]}, "results"),
        }
        request, key = requests[service]
        timeout = chance.choice((None, None, chance.uniform(0.02, 2)))
        began = asyncio.get_running_loop().time()
        call = asyncio.ensure_future(self._rig.client.invoke(service, request, timeout=timeout))
        if chance.random() < 0.2:
            await asyncio.wait({call}, timeout=chance.uniform(0, 1))
            call.cancel()
        try:
            answer = await call
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                call.cancel()
                raise
            self._tally.counts["unary calls cancelled"] += 1
            return
        self._tally.answered(request.get("model", f"tiny-{service}"), began)
        wanted = 1 if key == "choices" else 2
        if len(answer[key]) != wanted:
            self._tally.surprise(f"call, {service}: {str(answer)[:200]}")
        self._tally.counts["unary calls completed"] += 1

    async def _ask(self, name: str) -> None:
        await getattr(self._rig.client, name)()
        self._tally.counts["unary calls completed"] += 1

    async def _channels(self) -> None:
        """A host's connection that is closed while streams run on it."""
        chance = self.chance("channels")
        while not await self.pause(chance.uniform(0.3, 1.5)):
            await self._bounded("channel", self._channel(chance), (*BROKEN, LATE))

    async def _channel(self, chance: random.Random) -> None:
        client = await connect(self._rig.client.address)
        async with client:
            streams = [_Stream(self._tally, self._tag(), chance, "", self._longest) for _ in range(4)]
            self._tally.counts["streams begun"] += len(streams)
            reading = [asyncio.ensure_future(self._closed(stream, client)) for stream in streams]
            await asyncio.wait(reading, timeout=chance.uniform(0, 2))
        self._tally.counts["channels closed"] += 1
        await asyncio.gather(*reading)

    async def _closed(self, stream: _Stream, client: PluginClient) -> None:
        try:
            await stream.read(client.stream("chat", stream.request))
        except PluginProcessError:  # what our own library says of a channel that it has closed
            stream.left()
        except EnginePluginError as error:
            self._tally.failed("stream, channel", error, BROKEN)


_MESSAGES = [{"role": "user", "content": "Hello"}]


class _Stream:
    """One chat stream, whose events are checked."""

    def __init__(self, tally: Tally, tag: str, chance: random.Random, model: str, longest: int) -> None:
        self._tally = tally
        self._tag = tag
        self._model = model or chance.choices(CHAT_MODELS, (3, 2))[0]
        self._tokens = _FLOOD_TOKENS if model else chance.randint(1, longest)
        self._came = 0
        self.request = {
            "model": self._model,
            "messages": _MESSAGES,
            "max_tokens": self._tokens,
            "user": tag,
        }

    def left(self) -> None:
        """We go before the end."""
        self._tally.counts["streams cancelled"] += 1
        if self._came:
            self._tally.cancelled[self._tag] = asyncio.get_running_loop().time()

    async def read(
        self, chunks: ChunkStream, *, leave_after: int | None = None, at_done: bool = False, slowly: bool = False
    ) -> None:
        """To the end, or until so many tokens have come, or until all have but the end has not, or until we have been
        slow for a while."""
        began = asyncio.get_running_loop().time()
        done = False
        seconds = _SLOW
        try:
            async with chunks:
                async for chunk in chunks:
                    if not self._came:
                        self._tally.answered(self._model, began)
                    self._take(chunk)
                    done = done or _DONE in chunk
                    enough = leave_after is not None and self._came >= leave_after
                    if enough or (at_done and done) or seconds <= 0:
                        self.left()
                        return
                    if slowly:
                        await asyncio.sleep(_SLOW / 6)
                        seconds -= _SLOW / 6
        except asyncio.CancelledError:
            self.left()
            raise
        if not done or self._came != self._tokens:
            self._tally.surprise(f"stream: ended in order after {self._came} of {self._tokens} tokens, {done=}")
        self._tally.completed()

    def _take(self, chunk: bytes) -> None:
        for number in map(int, _WORD.findall(chunk)):
            if number != self._came:
                self._tally.surprise(f"stream: token {number} came in the place of {self._came}")
            self._came = number + 1
            self._tally.counts["tokens"] += 1
