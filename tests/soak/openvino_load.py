"""Calls of all eight services at once, left at moments of chance, and what befalls the models meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import engine_plugin
from engine_plugin.errors import EnginePluginError, NotFoundError
from engine_plugin.files import in_thread
from engine_plugin.host import events
from engine_plugin.waiting import comes_true
from tests.openvino.driver.running import PICTURE, tone
from tests.openvino.hosted.work import recording
from tests.soak.openvino_rig import MODELS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from engine_plugin.host import ChunkStream
    from tests.soak.openvino_rig import OpenVinoRig
    from tests.soak.tally import Tally

__all__ = ["OpenVinoLoad"]

_LIMIT = 60.0  # seconds, in which any call must have ended, one way or another
_BROKEN = (408, 412, 502, 503)
_SAMPLE = Path(engine_plugin.__file__).parent / "samples" / "openvino" / "tiny-embed"
_HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
_NUMBER = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
_QUESTIONS = ("list_models", "health_check", "running_models", "get_config", "check_engine")
_UNLUCKY = tuple(name for name in MODELS.values() if name != "tiny-chat")
"""Models whose processes are killed. That of chat lives on, so that one can see whether it grows."""


class OpenVinoLoad:
    """Runs until `over` is set."""

    def __init__(self, rig: OpenVinoRig, tally: Tally, seed: str) -> None:
        self.over = asyncio.Event()
        self._rig = rig
        self._tally = tally
        self._seed = seed
        self._plain = tone(2.0)
        self._other = recording(3, rate=44_100)

    def workers(self, streams: int) -> list[Coroutine[Any, Any, None]]:
        """What to run: as many streams at once, and the other calls and mishaps beside them."""
        kinds: list[tuple[str, Callable[[random.Random], Awaitable[None]], float]] = [
            *(("stream", self._text, 0.05) for _ in range(streams)),
            *(("picture", self._picture, 0.2) for _ in range(2)),
            *(("talk", self._talk, 0.3) for _ in range(2)),
            *(("call", self._call, 0.05) for _ in range(4)),
            ("question", self._question, 0.3),
            ("kill", self._kill, 5.0),
            ("unload", self._unload, 6.0),
            ("pull", self._pull, 3.0),
        ]
        return [self._again(f"{name} {number}", work, pause) for number, (name, work, pause) in enumerate(kinds)]

    async def _again(self, name: str, work: Callable[[random.Random], Awaitable[None]], pause: float) -> None:
        chance = random.Random(f"{self._seed} {name}")  # noqa: S311  # chance that can be repeated is what is wanted
        what = name.partition(" ")[0]
        while not await comes_true(self.over.wait(), within=chance.uniform(0.2, 2) * pause):
            try:
                async with asyncio.timeout(_LIMIT):
                    await work(chance)
            except TimeoutError:
                self._tally.surprise(f"{what}: had not ended after {_LIMIT:g} s")
                self._tally.waited_for = self._tally.waited_for or await self._rig.where()
            except EnginePluginError as error:
                self._tally.failed(what, error, _BROKEN)

    # Streams

    async def _text(self, chance: random.Random) -> None:
        if chance.random() < 0.5:
            service, request = "chat", dict(_HELLO)
            if chance.random() < 0.1:
                request["response_format"] = _NUMBER
        else:
            service, request = "generate", {"prompt": ["a"] * chance.choice((1, 4))}
        request |= {"max_tokens": chance.randint(1, 400), "ignore_eos": chance.random() < 0.7}
        timeout = chance.uniform(0.02, 1) if chance.random() < 0.1 else None
        await self._stream(self._rig.client.stream(service, request, timeout=timeout), chance)

    async def _picture(self, chance: random.Random) -> None:
        request = {**PICTURE, "num_inference_steps": chance.randint(1, 60), "n": chance.randint(1, 3)}
        if chance.random() < 0.3:
            await self._left_or_whole(self._rig.client.invoke("text-to-image", request), chance)
        else:
            await self._stream(self._rig.client.stream("text-to-image", request), chance)

    async def _stream(self, chunks: ChunkStream, chance: random.Random) -> None:
        self._tally.counts["streams begun"] += 1
        leave = chance.random() < 0.4
        left = chance.randint(0, 30)
        async with chunks:
            if leave and not left:
                await asyncio.sleep(chance.choice((0, 0.001, 0.05)))
                self._tally.counts["streams cancelled"] += 1
                return
            async for event in events(chunks):
                self._tally.counts["events"] += 1
                if "error" in event:
                    self._tally.surprise(f"stream: {str(event)[:200]}")
                left -= 1
                if leave and left <= 0:
                    self._tally.counts["streams cancelled"] += 1
                    return
        self._tally.completed()

    async def _talk(self, chance: random.Random) -> None:
        self._tally.counts["conversations"] += 1
        encoded = chance.random() < 0.5
        sound = self._other if encoded else bytes(64_000)
        last = ""
        async with self._rig.client.invoke_bidi("speech-to-text-ws") as talk:
            await talk.send(sound, metadata={"format": "wav" if encoded else "pcm"})
            if chance.random() < 0.3:
                await asyncio.sleep(chance.uniform(0, 0.5))
                self._tally.counts["conversations left"] += 1
                return
            await (talk.send('{"action": "finish-task"}') if chance.random() < 0.5 else talk.done_sending())
            async for message in talk:
                last = json.loads(message.data)["header"]["event"]
        if last != "task-finished":
            self._tally.surprise(f"talk: ended in order with {last}")
        self._tally.counts["conversations completed"] += 1

    # Calls

    async def _call(self, chance: random.Random) -> None:
        service, request = chance.choice(self._requests())
        bad = request.pop("bad", False)
        try:
            await self._left_or_whole(self._rig.client.invoke(service, request), chance)
        except EnginePluginError as error:
            if not (bad and error.code == 400):
                raise
            self._tally.counts["bad requests"] += 1

    def _requests(self) -> list[tuple[str, dict[str, Any]]]:
        import base64

        other = base64.b64encode(self._other).decode()
        return [
            ("chat", {**_HELLO, "max_tokens": 30}),
            ("embed", {"input": ["one", "two"]}),
            ("embed", {"input": "one"}),
            ("rerank", {"query": "a", "documents": ["b", "c"]}),
            ("speech-to-text", {"audio": self._plain, "response_format": "verbose_json"}),
            ("speech-to-text", {"audio": other}),
            ("speech-to-text", {"audio": base64.b64encode(b"no sound" * 20).decode(), "bad": True}),
            ("text-to-speech", {"text": "hello"}),
            ("chat", {**_HELLO, "temperature": "hot", "bad": True}),
        ]

    async def _left_or_whole(self, work: Coroutine[Any, Any, Any], chance: random.Random) -> None:
        self._tally.counts["unary calls"] += 1
        call = asyncio.ensure_future(work)
        try:
            if chance.random() < 0.25:
                await asyncio.wait({call}, timeout=chance.uniform(0, 0.4))
                call.cancel()
                await asyncio.wait({call})
                if call.cancelled():
                    self._tally.counts["unary calls cancelled"] += 1
                    return
            await call
        finally:
            call.cancel()
        self._tally.counts["unary calls completed"] += 1

    async def _question(self, chance: random.Random) -> None:
        await getattr(self._rig.client, chance.choice(_QUESTIONS))()

    # Mishaps

    async def _kill(self, chance: random.Random) -> None:
        names = {model["name"] for model in await self._rig.client.running_models()}
        workers = list(self._rig.workers().values())[1:]  # chat's is the first
        if workers and names:
            self._tally.counts["workers killed"] += 1
            with suppress(psutil.Error):
                chance.choice(workers).kill()

    async def _unload(self, chance: random.Random) -> None:
        name = chance.choice(_UNLUCKY)
        try:
            await self._rig.client.unload_model(name, timeout=_LIMIT)
            self._tally.counts["models unloaded"] += 1
        finally:
            if chance.random() < 0.5:
                await self._rig.client.load_model(name, timeout=_LIMIT)
                self._tally.counts["models loaded"] += 1

    async def _pull(self, chance: random.Random) -> None:
        source = self._rig.scratch / "pulled"
        if not source.exists():
            await in_thread(shutil.copytree, _SAMPLE, source)
        with suppress(TimeoutError):
            async with asyncio.timeout(chance.choice((10.0, chance.uniform(0, 0.05)))):
                async with aclosing(self._rig.client.pull_model_stream(str(source))) as steps:
                    async for _ in steps:
                        pass
                self._tally.counts["pulls"] += 1
        if chance.random() < 0.7:
            with suppress(NotFoundError):
                await self._rig.client.invoke("embed", {"input": "a", "model": "pulled"}, timeout=_LIMIT)
                self._tally.counts["pulled models used"] += 1
        with suppress(NotFoundError):
            await self._rig.client.delete_model("pulled", timeout=_LIMIT)
