"""Faults of an Ollama server in a soak, and control calls of the plugin meanwhile."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.errors import EnginePluginError
from tests.engines.llamacpp.running import ENDLESS
from tests.patience import patience
from tests.soak.ollama_load import BROKEN, LATE, SERVER
from tests.soak.ollama_rig import GOOD
from tests.soak.working import Working

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Coroutine

    from tests.soak.ollama_rig import OllamaRig
    from tests.soak.tally import Tally
    from tests.soak.working import Kind

__all__ = ["OllamaMishaps"]

_LIMIT = patience(7.5)
_TRIES = 50
_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)
_PULLS: dict[str, tuple[int, ...]] = {
    "fresh": (),
    "someone/special:v2": (),
    "fault-pull-slow": (),
    "fault-pull-quiet": (),
    "fault-pull-restart": (),
    "fault-pull-stall": (),
    "fault-pull-breaks": (500,),
    "fault-pull-no-success": (500,),
    "fault-pull-cut": (500,),
    "fault-pull-digest": (500,),
    "fault-pull-disk": (500,),
    "fault-pull-offline": (500,),
    "fault-pull-unauthorized": (500,),
    "nothing-like-it": (404,),
}
"""The models to pull, and for those that fail the expected error."""
_BROKEN_PULL = (*BROKEN, 500)
_RULES = ("error", "no-done", "cut", "garbage", "busy", "crashed", "hang-up", "html", "canceled")
_PATHS = ("/api/chat", "/api/generate", "/api/embed", "/api/tags", "/api/ps", "/api/version", "/")


class OllamaMishaps(Working):
    """Runs as long as its load."""

    def __init__(self, rig: OllamaRig, tally: Tally, seed: str, over: asyncio.Event, pace: float) -> None:
        """`over` is the load's; `pace` 1 is that of some minutes, less is quicker."""
        super().__init__(rig.where, tally, seed, BROKEN)
        self.over = over
        self._rig = rig
        self._pace = pace
        self._lock = asyncio.Lock()
        self._pulling: Counter[str] = Counter()
        self._deleting: set[str] = set()

    def workers(self) -> list[Coroutine[Any, Any, None]]:
        """What to run."""
        kinds: list[Kind] = [
            ("kill", self._kill, 7.0),
            ("freeze", self._freeze, 8.0),
            ("stop", self._stop_and_start, 17.0),
        ]
        if self._rig.life != "openai":  # whose models are its own affair
            kinds += [
                ("kill a runner", self._kill_a_runner, 3.0),
                ("rule", self._rule, 0.7),
                ("unload", self._unload, 4.0),
                ("pull", self._pull, 0.5),
                ("pull", self._pull, 0.5),
                ("pull a file", self._pull_a_file, 6.0),
            ]
        return self.each((name, work, pause * self._pace) for name, work, pause in kinds)

    # The server

    async def _kill(self, chance: random.Random) -> None:
        self._tally.crashed(SERVER)
        self._tally.counts["engines killed"] += 1
        if self._rig.life != "managed":
            async with self._lock:
                await self._rig.theirs.die()
                await asyncio.sleep(chance.uniform(0, 2))
                await self._rig.theirs.start()
            return
        victim = self._rig.server(guards=chance.random() < 0.2)
        if victim is not None:
            with suppress(psutil.Error):
                victim.send_signal(chance.choice(_SIGNALS))

    async def _kill_a_runner(self, chance: random.Random) -> None:
        if runners := self._rig.runners():
            self._tally.counts["runners killed"] += 1
            with suppress(psutil.Error):
                chance.choice(runners).kill()

    async def _freeze(self, chance: random.Random) -> None:
        """Suspend it for a moment, or longer than any limit."""
        async with self._lock:  # a frozen one is not to be killed and forgotten
            process = self._rig.server()
            if process is None:
                return
            self._tally.counts["engines frozen"] += 1
            with suppress(psutil.Error):
                process.suspend()
            try:
                await asyncio.sleep(chance.choice((0.3, 1.0, 2.5, 4.5)))
            finally:
                with suppress(psutil.Error):
                    process.resume()

    async def _rule(self, chance: random.Random) -> None:
        """One of the next requests goes wrong."""
        server = await self._rig.contract()
        with suppress(OSError):  # it has just died
            await asyncio.to_thread(server.fail, chance.choice(_RULES), path=chance.choice(_PATHS), times=1)
            self._tally.counts["rules"] += 1

    async def _stop_and_start(self, chance: random.Random) -> None:
        self._tally.counts["engine stopped and started"] += 1
        await self._done("stop", self._rig.client.stop_engine(timeout=_LIMIT), ())
        await asyncio.sleep(chance.choice((0, chance.uniform(0, 0.5))))
        for _ in range(_TRIES):  # it may be killed while it starts, and theirs may not be there
            if await self._done("start", self._rig.client.start_engine(timeout=_LIMIT), BROKEN):
                return
            await asyncio.sleep(0.2)
        self._tally.surprise(f"start: failed {_TRIES} times")

    # Models

    async def _unload(self, chance: random.Random) -> None:
        model = chance.choice((*GOOD, "embed", "fault-endless"))
        # It may not be loaded (412).
        if await self._done("unload", self._rig.client.unload_model(model, timeout=_LIMIT), (*BROKEN, 412)):
            self._tally.counts["models unloaded"] += 1
        if chance.random() < 0.6:
            await self._done("load", self._rig.client.load_model(model, timeout=_LIMIT), BROKEN)

    async def _pull(self, chance: random.Random) -> None:
        """A model from the registry or from here, which is left or fails or comes; then deleted."""
        model, codes = chance.choice(list(_PULLS.items()))
        source = ""
        if chance.random() < 0.2:
            model, source, codes = "copied", "model:tiny-chat", ()
        if model in self._deleting:  # it would be gone when it has come
            return
        seconds = chance.choice((5.0, chance.uniform(0, 0.4))) if model != "fault-pull-stall" else 0.5
        if await self._pull_for(model, source, seconds, codes) and codes:
            self._tally.surprise(f"pull {model}: came to its end")
        if chance.random() < 0.5 and not self._pulling[model]:
            await self._delete(model)

    async def _pull_a_file(self, chance: random.Random) -> None:
        await self._pull_for("from-a-file", str(ENDLESS), chance.choice((5.0, chance.uniform(0, 0.1))), ())
        await self._delete("from-a-file")

    async def _pull_for(self, model: str, source: str, seconds: float, codes: tuple[int, ...]) -> bool:
        """Pull, and leave after so many seconds. True when it came to its end."""
        came: list[str] = []
        self._tally.counts["pulls"] += 1
        self._pulling[model] += 1
        try:
            await self._done(f"pull {model}", self._pulled(model, source, seconds, came), (*_BROKEN_PULL, *codes))
        finally:
            self._pulling[model] -= 1
        return bool(came)

    async def _pulled(self, model: str, source: str, seconds: float, came: list[str]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async with aclosing(self._rig.client.pull_model_stream(model, source=source)) as steps:
                    async for _ in steps:
                        pass
                came.append(model)
                return
        self._tally.counts["pulls cancelled"] += 1

    async def _delete(self, model: str) -> None:
        """It may not have come (404), or be used (412)."""
        self._deleting.add(model)
        try:
            await self._done("delete", self._rig.client.delete_model(model, timeout=_LIMIT), (*BROKEN, 404, 412))
        finally:
            self._deleting.discard(model)

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
        if self._rig.life == "openai":
            return
        for model in ("copied", "from-a-file", *_PULLS):
            await self._delete(model)
