"""The phases of a soak: warm up, rest, load, rest, compare, end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import EnginePluginError, UnavailableError
from tests.patience import patience
from tests.soak.figures import Figures
from tests.soak.load import Load
from tests.soak.mishaps import Mishaps, lives
from tests.soak.phase import under_load
from tests.soak.rig import CHAT_MODELS, FLOOD, rig
from tests.soak.tally import Tally

if TYPE_CHECKING:
    from tests.soak.rig import Rig

__all__ = ["Plan", "soak"]

_ENDING = patience(25)  # seconds for all but the load
_SLOWEST = patience(5)


@dataclass(frozen=True, slots=True)
class Plan:
    """Duration, amount and seed. `warm_up` and `seconds` are those of the load."""

    seconds: float
    warm_up: float
    streams: int
    seed: int
    pace: float = 1.0
    longest: int = 60
    interval: float = 0.1
    deaths: int = 3
    """How often the plugin itself is killed in the end, where that is done."""

    @classmethod
    def of(cls, minutes: float, streams: int, seed: int) -> Plan:
        """In so many minutes in all."""
        seconds = minutes * 60
        warm_up = min(45.0, max(3.0, seconds / 5))
        return cls(seconds=max(3.0, seconds - warm_up), warm_up=warm_up, streams=streams, seed=seed)

    @property
    def limit(self) -> float:
        """Seconds after which it ends, whatever happens."""
        return self.seconds + self.warm_up + _ENDING

    def engine(self) -> dict[str, object]:
        """The plugin's engine options: room for most of the streams, not for all, nor for all models."""
        return {
            "max_loaded_models": 4,
            "parallel": max(2, min(256, self.streams * 55 // 100)),
            "max_queue": self.streams,
            "threads": 1,
            "stop_timeout": 1,
            "drain_timeout": 2,
            "health_interval": 0.5,
            "start_timeout": 6,
            "hung_timeout": 3,
            "restart_backoff": 0.1,
            "stable_time": 5,
        }


async def soak(plan: Plan) -> Figures:
    """Run the whole soak. Nothing is left in any case."""
    figures = Figures({"seed": plan.seed, "streams": plan.streams}, Tally())
    try:
        async with asyncio.timeout(plan.limit):
            await _soak(plan, figures)
    except TimeoutError:
        figures.wrong.append(f"it had not come to its end after {plan.limit:g} s")
    return figures


async def _soak(plan: Plan, figures: Figures) -> None:
    async with rig(plan.engine(), plan.limit + 60) as made:
        _write_script(plan, made)
        await _phase(plan, made, "warm-up", plan.warm_up, Figures({}, Tally()))
        figures.before = await made.rest()
        await made.client.start_engine(timeout=_SLOWEST)
        made.log.restarts, lives_before = 0, len(made.fake.events("started"))
        await _phase(plan, made, "load", plan.seconds, figures)
        figures.restarts = made.log.restarts
        figures.lives = len(made.fake.events("started")) - lives_before
        await _still_answers(made, figures)
        figures.after = await made.rest(figures.before)
        _read_journal(made, figures)
        figures.partials = len(list((made.scratch / "data" / "models" / ".partial").glob("*.part")))
        figures.left = await made.end()
        figures.complaints = made.log.complaints


def _write_script(plan: Plan, made: Rig) -> None:
    chance = Load(made, Tally(), str(plan.seed), 1).chance("script")
    badly = {model.replace("-", "_"): lives(chance, 150, plan.interval) for model in CHAT_MODELS}
    made.fake.behave({"interval": plan.interval}, **badly, **{FLOOD: [{"interval": 0}]})


async def _phase(plan: Plan, made: Rig, name: str, seconds: float, figures: Figures) -> None:
    load = Load(made, figures.tally, f"{plan.seed} {name}", plan.longest)
    mishaps = Mishaps(made, load, figures.tally, plan.pace)
    works = (*load.workers(plan.streams), *mishaps.workers(min(seconds, plan.warm_up)))
    await under_load(name, seconds, works, load.over, made.plugin, figures)
    await mishaps.tidy_up()


async def _still_answers(made: Rig, figures: Figures) -> None:
    """Check that every service still answers."""
    client = made.client
    hello = {"messages": [{"role": "user", "content": "Hello"}]}
    asked: list[tuple[str, dict[str, Any]]] = [("chat", {**hello, "model": name}) for name in CHAT_MODELS]
    asked += [("embed", {"input": "one"}), ("rerank", {"query": "b", "documents": ["c"]})]
    for service, request in asked:
        try:
            try:
                await client.invoke(service, request, timeout=_SLOWEST)
            except UnavailableError:  # the last fault that was injected may have waited for a request
                await client.invoke(service, request, timeout=_SLOWEST)
        except EnginePluginError as error:
            figures.wrong.append(f"afterwards, {service}: {type(error).__name__}: {error}")


def _read_journal(made: Rig, figures: Figures) -> None:
    for event in made.fake.events():
        if event["event"] in ("refused", "bind_refused"):
            figures.wrong.append(f"an engine's journal: {event}")
        elif event["event"] == "left" and event["user"] in figures.tally.cancelled:
            figures.cancel_seen.append(event["at"] - figures.tally.cancelled[event["user"]])
