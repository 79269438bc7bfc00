"""Concurrent calls of all eight services, abandoned at random moments, and faults of the models meanwhile."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import engine_plugin
from engine_plugin.errors import EnginePluginError, NotFoundError
from engine_plugin.host import events
from engine_plugin.system.files import in_thread
from tests.engines.openvino.driver.running import PICTURE, tone
from tests.engines.openvino.hosted.work import recording
from tests.patience import patience
from tests.soak.openvino_rig import MODELS
from tests.soak.working import Working

if TYPE_CHECKING:
    import random
    from collections.abc import Coroutine

    from engine_plugin.host import ChunkStream
    from tests.soak.openvino_rig import OpenVinoRig
    from tests.soak.tally import Tally
    from tests.soak.working import Kind

__all__ = ["OpenVinoLoad"]

_LIMIT = patience(10)  # seconds, in which any call must have ended, one way or another
_BROKEN = (408, 412, 502, 503)
_SAMPLE = Path(engine_plugin.__file__).parent / "samples" / "openvino" / "tiny-embed"
_HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
_NUMBER = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
_QUESTIONS = ("list_models", "health_check", "running_models", "get_config", "check_engine")
_UNLUCKY = tuple(name for name in MODELS.values() if name != "tiny-chat")
"""Models whose processes are killed. That of chat lives on, so that one can see whether it grows."""


class OpenVinoLoad(Working):
    """Everything at once."""

    def __init__(self, rig: OpenVinoRig, tally: Tally, seed: str) -> None:
        super().__init__(rig.where, tally, seed, _BROKEN)
        self._rig = rig
        self._plain = tone(2.0)
        self._other = recording(3, rate=44_100)

    def workers(self, streams: int) -> list[Coroutine[Any, Any, None]]:
        """What to run: as many streams at once, and the other calls and mishaps beside them."""
        kinds: list[Kind] = [
            *(("stream", self._text, 0.05) for _ in range(streams)),
            *(("picture", self._picture, 0.2) for _ in range(2)),
            *(("talk", self._talk, 0.3) for _ in range(2)),
            *(("call", self._call, 0.05) for _ in range(4)),
            ("question", self._question, 0.3),
            ("kill", self._kill, 5.0),
            ("unload", self._unload, 6.0),
            ("pull", self._pull, 3.0),
        ]
        return self.each(kinds)

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
        encoded = chance.random() < 0.5
        sound = self._other if encoded else bytes(64_000)
        await self._conversed(self._rig.client, sound, "wav" if encoded else "pcm", chance)

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
