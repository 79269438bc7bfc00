"""Work repeated at random moments, each time within limits, until the load is over."""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING, Any, TypeAlias

from engine_plugin.errors import EnginePluginError
from engine_plugin.waiting import comes_true
from tests.patience import patience

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable

    from engine_plugin.host import PluginClient
    from tests.soak.tally import Tally

__all__ = ["Kind", "Working"]

_LIMIT = patience(10)  # seconds, in which any call must have ended, one way or another

Kind: TypeAlias = "tuple[str, Callable[[random.Random], Awaitable[None]], float]"
"""What its failures are noted as, what is done, and the seconds between two times."""


class Working:
    """Runs until `over` is set."""

    def __init__(
        self, where: Callable[[], Awaitable[list[str]]], tally: Tally, seed: str, broken: tuple[int, ...]
    ) -> None:
        """`where` tells what the plugin waits for, `broken` are the codes that calls may end with."""
        self.over = asyncio.Event()
        self._where = where
        self._tally = tally
        self._seed = seed
        self._broken = broken

    def each(self, kinds: Iterable[Kind]) -> list[Coroutine[Any, Any, None]]:
        """What to run."""
        return [self._again(f"{name} {number}", work, pause) for number, (name, work, pause) in enumerate(kinds)]

    def chance(self, who: str = "") -> random.Random:
        """Return a generator for one caller, so that its choices do not depend on the order of callers."""
        return random.Random(f"{self._seed} {who}")  # noqa: S311  # chance that can be repeated is what is wanted

    async def _again(self, name: str, work: Callable[[random.Random], Awaitable[None]], pause: float) -> None:
        chance = self.chance(name)
        what = name.partition(" ")[0]
        while not await comes_true(self.over.wait(), within=chance.uniform(0.2, 2) * pause):
            try:
                async with asyncio.timeout(_LIMIT):
                    await work(chance)
            except TimeoutError:
                self._tally.surprise(f"{what}: had not ended after {_LIMIT:g} s")
                self._tally.waited_for = self._tally.waited_for or await self._where()
            except EnginePluginError as error:
                self._tally.failed(what, error, self._broken)
                await self.pause(chance)

    async def pause(self, chance: random.Random) -> None:
        """Pause after a failed call."""
        await comes_true(self.over.wait(), within=chance.uniform(0.05, 0.6))

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

    async def _conversed(self, client: PluginClient, sound: bytes, form: str, chance: random.Random) -> None:
        """One live transcription, to its end or left."""
        self._tally.counts["conversations"] += 1
        last = ""
        async with client.invoke_bidi("speech-to-text-ws") as talk:
            await talk.send(sound, metadata={"format": form})
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
