"""Faults of an engine in a soak: death, suspension, unloading, stops and abandoned pulls."""

from __future__ import annotations

import asyncio
import shutil
import signal
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.errors import EnginePluginError
from tests.engines.llamacpp.running import ENDLESS, gone
from tests.models.server import Script
from tests.patience import patience
from tests.soak.load import BROKEN, LATE
from tests.soak.rig import CHAT_MODELS, FLOOD

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable, Coroutine

    from tests.soak.load import Load
    from tests.soak.rig import Rig
    from tests.soak.tally import Tally

__all__ = ["Mishaps", "lives"]

_LIMIT = patience(7.5)
_FROST = patience(2.5)  # seconds, in which a plugin must have ended an engine that does nothing at all
_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM)
_PULLED = 3
_FAULTS: tuple[dict[str, Any], ...] = (
    {"do": "cut", "after": 2},
    {"do": "event", "after": 1, "data": {"error": {"code": 500, "message": "lost"}}},
    {"do": "garbage"},
    {"do": "truncated", "where": "head"},
    {"do": "truncated", "where": "chunk"},
    {"do": "reset"},
    {"do": "close"},
    {"do": "status", "status": 500},
    {"do": "status", "status": 503},
    {"do": "die", "after": 1, "code": 3},
    {"do": "die", "code": 0},
    {"do": "die", "after": 3, "signal": "SIGSEGV", "lines": ["error: as if by chance"]},
    {"do": "flood", "fd": 2, "mib": 1},
)


def lives(chance: random.Random, count: int, interval: float) -> list[dict[str, Any]]:
    """Return a script for the fake engine: each process run gives some wrong answers, and most end in a request."""
    return [{"interval": interval, "rules": _rules(chance)} for _ in range(count)]


def _rules(chance: random.Random) -> list[dict[str, Any]]:
    faults = [{"on": "chat", "from": chance.randint(1, 1500), "count": 1, **chance.choice(_FAULTS)} for _ in range(8)]
    return [*faults, {"on": "embed", "from": chance.randint(5, 60), "count": 1, "do": "truncated", "where": "body"}]


class Mishaps:
    """Runs as long as its load."""

    def __init__(self, rig: Rig, load: Load, tally: Tally, pace: float) -> None:
        """`pace` 1 is that of some minutes; less is quicker."""
        self._rig = rig
        self._load = load
        self._tally = tally
        self._pace = pace
        self._frozen_now: set[int] = set()

    def workers(self, seconds: float) -> list[Coroutine[Any, Any, None]]:
        """What to run. Each kind comes at least once in so many seconds."""
        kinds: tuple[tuple[Callable[[random.Random], Awaitable[None]], float], ...] = (
            (self._kill, 8),
            (self._freeze, 9),
            (self._freeze_to_death, 45),
            (self._unload, 9),
            (self._stop_and_start, 25),
            (self._pull, 1.5),
        )
        return [self._again_and_again(kind, period * self._pace, seconds) for kind, period in kinds]

    async def _again_and_again(
        self, kind: Callable[[random.Random], Awaitable[None]], period: float, seconds: float
    ) -> None:
        chance = self._load.chance(kind.__name__)
        pause = chance.uniform(0.1, 0.6) * min(period, seconds)
        while not await self._load.pause(pause):
            await kind(chance)
            pause = chance.uniform(0.5, 1.5) * period

    def _victim(self, chance: random.Random) -> tuple[psutil.Process, str] | None:
        engines = sorted(self._engines(guards=chance.random() < 0.2), key=lambda engine: engine[1])
        return chance.choice(engines) if engines else None

    def _engines(self, *, guards: bool = False) -> list[tuple[psutil.Process, str]]:
        """Return the engines that are not suspended: only the code that suspended a process resumes it."""
        engines = self._rig.engines(guards=guards)
        return [engine for engine in engines if engine[0].pid not in self._frozen_now]

    async def _kill(self, chance: random.Random) -> None:
        number = chance.choice(_SIGNALS)
        if victim := self._victim(chance):
            process, model = victim
            self._tally.counts["engines killed"] += 1
            if model in CHAT_MODELS:  # the others are asked so seldom that the time until then would count
                self._tally.crashed(model)
            with suppress(psutil.Error):
                process.send_signal(number)

    async def _freeze(self, chance: random.Random) -> None:
        """Suspend it for a moment, as a swapping machine does."""
        seconds = chance.uniform(0.2, 1.5)
        if victim := self._victim(chance):
            self._tally.counts["engines frozen"] += 1
            await self._frozen(victim[0], seconds)

    async def _freeze_to_death(self, chance: random.Random) -> None:
        """Suspend it until the plugin kills it."""
        engines = [engine for engine in self._engines() if engine[1] in CHAT_MODELS]
        if not engines:
            return
        process, model = chance.choice(engines)
        self._tally.counts["engines frozen to death"] += 1
        self._tally.crashed(model, frozen=True)
        if not await self._frozen(process, _FROST):
            self._tally.surprise(f"a frozen engine was not ended in {_FROST:g} s")

    async def _frozen(self, process: psutil.Process, seconds: float) -> bool:
        """Suspend it for so long and resume it; return True when it has ended meanwhile."""
        end = asyncio.get_running_loop().time() + seconds
        self._frozen_now.add(process.pid)
        with suppress(psutil.Error):
            process.suspend()
        try:
            # Only its parent is notified of its end.
            while not gone(process) and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        finally:
            with suppress(psutil.Error):
                process.resume()
            self._frozen_now.discard(process.pid)
        return gone(process)

    async def _unload(self, chance: random.Random) -> None:
        model = chance.choice((*CHAT_MODELS, FLOOD, "tiny-embed-gguf", "tiny-rerank-gguf"))
        # It may not be loaded (412).
        if await self._done("unload", self._rig.client.unload_model(model, timeout=_LIMIT), (*BROKEN, 412)):
            self._tally.counts["models unloaded"] += 1
        if chance.random() < 0.6:
            await self._done("load", self._rig.client.load_model(model, timeout=_LIMIT), BROKEN)

    async def _stop_and_start(self, chance: random.Random) -> None:
        self._tally.counts["engine stopped and started"] += 1
        await self._done("stop", self._rig.client.stop_engine(timeout=_LIMIT), ())
        await asyncio.sleep(chance.choice((0, chance.uniform(0, 0.5))))
        await self._done("start", self._rig.client.start_engine(timeout=_LIMIT), ())

    async def _pull(self, chance: random.Random) -> None:
        """A model from the disk or a server, which is left or breaks off, or comes to its end; then deleted."""
        name = f"pulled-{chance.randrange(_PULLED)}"
        if chance.random() < 0.5:
            path = self._rig.scratch / f"{name}.gguf"
            if not path.exists():
                shutil.copy(ENDLESS, path)
            source = str(path)
        else:
            source = self._rig.files.url(f"/{name}.gguf")
            if chance.random() < 0.7:
                self._rig.files.scripts.append(Script(drop_after=chance.randint(0, 600_000)))
        seconds = chance.choice((5.0, chance.uniform(0, 0.4)))
        if await self._done("pull", self._pull_for(source, seconds), BROKEN):
            self._tally.counts["pulls"] += 1
        self._rig.files.scripts.clear()
        if chance.random() < 0.5:
            # It may not have come (404), be used or be pulled (412).
            await self._done("delete", self._rig.client.delete_model(name, timeout=_LIMIT), (404, 412))

    async def _pull_for(self, source: str, seconds: float) -> None:
        """Pull, and leave after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async with aclosing(self._rig.client.pull_model_stream(source)) as steps:
                    async for _ in steps:
                        pass
                return
        self._tally.counts["pulls cancelled"] += 1

    async def _done(self, what: str, call: Awaitable[Any], allowed: tuple[int, ...]) -> bool:
        try:
            await call
        except EnginePluginError as error:
            late = "; it takes too long" if error.code == LATE else ""
            self._tally.failed(f"{what}{late}", error, allowed)
            return False
        return True

    async def tidy_up(self) -> None:
        """Delete what pulls have left, as a host would."""
        for number in range(_PULLED):
            await self._done("delete", self._rig.client.delete_model(f"pulled-{number}", timeout=_LIMIT), (404,))
