"""Concurrent calls of an Ollama in both flavors of JSON, abandoned at random moments; the answers are checked to the
last word."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import EnginePluginError, error_for_code
from engine_plugin.host import events
from tests.engines.openvino.driver.running import tone
from tests.engines.openvino.hosted.work import recording
from tests.soak import openai_server
from tests.soak.ollama_rig import FAULTS, GOOD
from tests.soak.working import Working

if TYPE_CHECKING:
    import random
    from collections.abc import Coroutine

    from engine_plugin.host import ChunkStream
    from tests.soak.ollama_rig import OllamaRig
    from tests.soak.tally import Tally
    from tests.soak.working import Kind

__all__ = ["BROKEN", "LATE", "SERVER", "OllamaLoad", "ask_for"]

BROKEN = (502, 503)
"""What a call may end with while servers die and are stopped."""
LATE = 408
SERVER = "server"
"""As what its deaths and answers are noted: there is one."""

_WAV_HEAD = 44
_SERVICES = ("chat", "generate", "embed", "speech-to-text")
_OPENAI_SERVICES = ("text-to-speech",)
_QUESTIONS = ("list_models", "health_check", "running_models", "get_operate_status", "get_config", "check_engine")
_WAYS = {"whole": 46, "before": 10, "middle": 15, "deadline": 10, "bad": 9, "stalled": 6, "endless": 4}
"""How a stream ends, and how often in a hundred: by itself, left at once or amid its words, at its deadline, by a
fault, or left when nothing more comes, or never an end."""


class OllamaLoad(Working):
    """All calls of a soak."""

    def __init__(self, rig: OllamaRig, tally: Tally, seed: str, longest: int) -> None:
        """`longest`: words of the longest stream."""
        super().__init__(rig.where, tally, seed, BROKEN)
        self._rig = rig
        self._longest = longest
        is_openai = rig.life == "openai"
        self._good: tuple[str, ...] = openai_server.GOOD if is_openai else GOOD
        self._faults = openai_server.FAULTS if is_openai else FAULTS
        self._sound = tone(0.2)
        self._spoken = recording(3, rate=16_000)[_WAV_HEAD:]
        self._number = 0

    def workers(self, streams: int) -> list[Coroutine[Any, Any, None]]:
        """What to run: as many streams at once, and the other calls beside them."""
        kinds: list[Kind] = [
            *(("stream", self._stream, 0.1) for _ in range(streams)),
            *(("call", self._call, 0.1) for _ in range(max(2, streams // 8))),
            ("bad request", self._bad_request, 1.0),
            ("question", self._question, 0.3),
            ("leaver", self.leave, 0.4),
            ("talk", self._talk, 0.5),
        ]
        return self.each(kinds)

    # Streams

    async def _stream(self, chance: random.Random) -> None:
        way = chance.choices(list(_WAYS), list(_WAYS.values()))[0]
        self._tally.counts["streams begun"] += 1
        try:
            await self._stream_of(way, chance)
        except EnginePluginError as error:
            allowed = (*BROKEN, LATE) if way == "deadline" else BROKEN
            self._tally.failed(f"stream, {way}", error, allowed)
            await self.pause(chance)

    async def _stream_of(self, way: str, chance: random.Random) -> None:
        service = chance.choice(("chat", "generate"))
        match way:
            case "bad":
                await self._bad(service, chance)
            case "stalled" | "endless":
                names = ("fault-endless",) if way == "endless" else ("fault-stall", "fault-silent")
                chunks = self._rig.client.stream(service, ask_for(service, chance.choice(names), "count 9"))
                await self._left(chunks, chance.uniform(0.05, 1.5))
            case "before":
                chunks = self._rig.client.stream(service, ask_for(service, chance.choice(self._good), "count 9"))
                await self._left(chunks, chance.choice((0, 0.001, chance.uniform(0, 0.05))))
            case _:
                reading = _Reading(self._tally, service, chance.choice(self._good), chance.randint(1, self._longest))
                timeout = chance.uniform(0.02, 2) if way == "deadline" else None
                chunks = self._rig.client.stream(service, reading.request, timeout=timeout)
                await reading.read(chunks, chance.randint(1, self._longest) if way == "middle" else None)

    async def _bad(self, service: str, chance: random.Random) -> None:
        """Call a model that fails, and check the error."""
        name = chance.choice(list(self._faults))
        request = ask_for(service, name, "count 9")
        try:
            if chance.random() < 0.3:
                await self._rig.client.invoke(service, request)
            else:
                async with self._rig.client.stream(service, request) as chunks:
                    async for _ in events(chunks):
                        pass
        except EnginePluginError as error:
            self._tally.failed(f"{service} of {name}", error, (*BROKEN, self._faults[name]))
        else:
            self._tally.surprise(f"{service} of {name}: ended in order")
        self._tally.counts["streams that fail"] += 1

    async def _left(self, chunks: ChunkStream, seconds: float) -> None:
        """Read for so many seconds, then abandon the stream."""
        try:
            async with asyncio.timeout(seconds), chunks:
                async for _ in chunks:
                    pass
        except TimeoutError:
            self._tally.counts["streams cancelled"] += 1

    async def leave(self, chance: random.Random) -> None:
        """Abandon a stalled stream, and measure how long the server continues it."""
        server = await self._rig.contract()
        self._number += 1
        service = chance.choice(("chat", "generate"))
        request = ask_for(service, "fault-stall", "count 9", seed=self._number)
        self._tally.counts["streams begun"] += 1
        stream = self._rig.client.stream(service, request)
        async with stream:
            await anext(aiter(stream))
        self._tally.counts["streams cancelled"] += 1
        began = asyncio.get_running_loop().time()
        for _ in range(100):
            open_now = await _of_server(server.requests, state="open")
            if all(_seed_of(entry["body"] or {}) != self._number for entry in open_now):
                self._tally.noticed.append(asyncio.get_running_loop().time() - began)
                return
            await asyncio.sleep(0.02)
        self._tally.surprise("a stream that was left goes on at the server")

    # Calls

    async def _call(self, chance: random.Random) -> None:
        services = [*_SERVICES, *(_OPENAI_SERVICES if self._rig.life == "openai" else ())]
        service = chance.choice(services)
        request: dict[str, Any]
        match service:
            case "embed":
                request = {"input": "one"}
            case "text-to-speech":
                request = {"text": "one"}
            case "speech-to-text":
                request = {"audio": self._sound}
            case _:
                count = chance.randint(1, self._longest)
                request = ask_for(service, chance.choice(self._good), f"count {count}")
        await self._left_or_whole(self._rig.client.invoke(service, request), chance)

    async def _talk(self, chance: random.Random) -> None:
        await self._conversed(self._rig.client, self._spoken, "pcm", chance)

    async def _bad_request(self, chance: random.Random) -> None:
        """Send an invalid request and check its error."""
        self._tally.counts["bad requests"] += 1
        one = [{"role": "user", "content": "one"}]
        asked: list[tuple[str, dict[str, Any], int]] = [
            ("embed", {"model": "embed"}, 400),
            ("chat", {"messages": "one"}, 400),
        ]
        if self._rig.life != "openai":
            asked += [
                ("embed", {"model": "tiny-chat", "input": "one"}, 400),
                ("chat", {"model": "embed", "messages": one}, 400),
                ("chat", {"model": "missing", "messages": one}, 404),
                ("rerank", {"query": "one", "documents": ["two"]}, 404),
            ]
        service, request, code = chance.choice(asked)
        try:
            await self._rig.client.invoke(service, request)
        except EnginePluginError as error:
            self._tally.failed(f"bad request, {service}", error, (*BROKEN, code))
        else:
            self._tally.surprise(f"bad request, {service}: answered")

    async def _question(self, chance: random.Random) -> None:
        await getattr(self._rig.client, chance.choice(_QUESTIONS))()


def ask_for(service: str, model: str, prompt: str, seed: int | None = None) -> dict[str, Any]:
    """Return a request that is valid in both flavors."""
    what: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    if service == "generate":
        what = {"prompt": prompt}
    return {"model": model, **what, **({} if seed is None else {"seed": seed})}


def _seed_of(body: dict[str, Any]) -> Any:
    """As OpenAI has it, or Ollama."""
    return body.get("seed", (body.get("options") or {}).get("seed"))


async def _of_server(ask: Any, **facts: str) -> Any:
    """What the contract server tells. Raises UnavailableError when it has just died."""
    try:
        return await asyncio.to_thread(ask, **facts)
    except (OSError, json.JSONDecodeError) as error:
        raise error_for_code(503, f"the contract server: {error}") from error


class _Reading:
    """One stream of words, which are checked."""

    def __init__(self, tally: Tally, service: str, model: str, count: int) -> None:
        self._tally = tally
        self._model = model
        self._wanted = " ".join(str(number) for number in range(1, count + 1))
        self._came = ""
        self._last: dict[str, Any] = {}
        self.request = ask_for(service, self._model, f"count {count}")

    async def read(self, chunks: ChunkStream, leave_after: int | None) -> None:
        """To the end, or until so many words have come."""
        loop = asyncio.get_running_loop()
        began, first = loop.time(), True
        async with chunks:
            async for event in events(chunks):
                if first:
                    self._tally.answered(SERVER, began)
                    first = False
                self._take(event)
                if leave_after is not None and self._came.count(" ") >= leave_after:
                    self._tally.counts["streams cancelled"] += 1
                    return
        if self._came != self._wanted or not _is_last(self._last):
            self._tally.surprise(f"stream of {self._model}: ended in order with {self._came[-40:]!r}, {self._last}")
        self._tally.completed()

    def _take(self, event: dict[str, Any]) -> None:
        self._last = event
        word = _word(event)
        if word:
            self._tally.counts["tokens"] += 1
            self._came += word
            if not self._wanted.startswith(self._came):
                self._tally.surprise(f"stream of {self._model}: {self._came[-40:]!r} is not what was asked for")


def _word(event: dict[str, Any]) -> str:
    """What an event of either flavor adds to the answer."""
    choices = event.get("choices")
    if choices is None:
        said = event["message"]["content"] if "message" in event else event["response"]
    elif not choices:
        said = ""
    else:
        [choice] = choices
        said = choice["delta"].get("content") if "delta" in choice else choice["text"]
    return str(said or "")


def _is_last(event: dict[str, Any]) -> bool:
    choices = event.get("choices")
    return event.get("done") is True if choices is None else bool(choices and choices[0]["finish_reason"])
