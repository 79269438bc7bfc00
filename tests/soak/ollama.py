"""A soak of two Ollama plugins side by side: one with a managed server, one attached to another server."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.errors import EnginePluginError
from tests.engines.llamacpp.running import REPOSITORY, gone, processes_of
from tests.engines.ollama.contract.handle import ContractClient
from tests.patience import patience
from tests.soak.figures import Figures
from tests.soak.ollama_load import OllamaLoad, ask_for
from tests.soak.ollama_mishaps import OllamaMishaps
from tests.soak.ollama_rig import Life, OllamaRig, environment, ollama_rig
from tests.soak.phase import under_load
from tests.soak.rig import MARK, left_behind
from tests.soak.tally import Tally

if TYPE_CHECKING:
    from tests.soak.run import Plan

__all__ = ["LIVES", "BothLives", "OllamaFigures", "soak_ollama"]

LIVES: tuple[Life, ...] = ("managed", "attached")
_SLOWEST = patience(10)
_UNDER_LOAD = 1.0  # seconds, after which a plugin is killed
_AT_ONCE = patience(2)  # seconds, in which everything of a plugin that is gone must be gone
_SETTLE = patience(2.5)
_LOOK = 0.1


@dataclass(slots=True)
class OllamaFigures(Figures):
    """The figures of one plugin."""

    ends: list[float] = field(default_factory=list)
    """Seconds from the plugin's death, or its host's, until nothing of it was left."""

    def to_json(self) -> dict[str, Any]:
        return {**Figures.to_json(self), "death_to_nothing_left_seconds": [round(end, 2) for end in self.ends]}

    def text(self) -> str:
        shape = self.to_json()
        rows = [
            ("life", self.about["life"]),
            ("counts", {what: count for what, count in shape["counts"].items() if ": " not in what}),
            ("seconds from the plugin's death until nothing was left", shape["death_to_nothing_left_seconds"]),
        ]
        return "\n".join([*(f"{name}: {value}" for name, value in rows), Figures.text(self)])


@dataclass(slots=True)
class BothLives:
    """The figures of both plugins, which run side by side."""

    lives: dict[Life, OllamaFigures]

    def problems(self) -> list[str]:
        """Return the problems; empty when the soak is clean."""
        return [f"{life}: {problem}" for life, figures in self.lives.items() for problem in figures.problems()]

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {life: figures.to_json() for life, figures in self.lives.items()}

    def text(self) -> str:
        """The report for people."""
        return "\n\n".join(figures.text() for figures in self.lives.values())


async def soak_ollama(plan: Plan, lives: tuple[Life, ...] = LIVES) -> BothLives:
    """Run the whole soak. Nothing is left in any case."""
    both = BothLives(
        {
            life: OllamaFigures({"life": life, "seed": plan.seed, "streams": plan.streams // len(lives)}, Tally())
            for life in lives
        }
    )
    async with asyncio.TaskGroup() as group:
        for figures in both.lives.values():
            group.create_task(_bounded(plan, figures))
    return both


async def _bounded(plan: Plan, figures: OllamaFigures) -> None:
    limit = plan.limit + _SLOWEST
    try:
        async with asyncio.timeout(limit), ollama_rig(figures.about["life"], {}) as made:
            await _soak(plan, made, figures)
    except TimeoutError:
        figures.wrong.append(f"it had not come to its end after {limit:g} s")


async def _soak(plan: Plan, made: OllamaRig, figures: OllamaFigures) -> None:
    await _phase(plan, made, "warm-up", plan.warm_up, OllamaFigures(figures.about, Tally()))
    figures.before = await made.rest()
    await made.client.start_engine(timeout=_SLOWEST)
    made.log.restarts = 0
    await _phase(plan, made, "load", plan.seconds, figures)
    figures.restarts, figures.cancel_seen = made.log.restarts, figures.tally.noticed
    begun = ("engine stopped and started",) if made.life == "managed" else ("engines killed",)
    figures.lives = figures.restarts + sum(figures.tally.counts[what] for what in begun)
    await _still_answers(made, figures)
    await _nothing_open(made, figures)
    figures.after = await made.rest(figures.before)
    figures.left = await made.end()
    for number in range(1, plan.deaths + 1):
        await _death(plan, await made.anew(number), figures, f"death {number}")
    await _host_gone(made, figures)
    figures.complaints = made.log.complaints
    await _theirs_lives(made, figures)


async def _phase(plan: Plan, made: OllamaRig, name: str, seconds: float, figures: OllamaFigures) -> None:
    seed = f"{plan.seed} {made.life} {name}"
    load = OllamaLoad(made, figures.tally, seed, plan.longest)
    mishaps = OllamaMishaps(made, figures.tally, seed, load.over, plan.pace)
    works = (*load.workers(figures.about["streams"]), *mishaps.workers())
    await under_load(f"{made.life} {name}", seconds, works, load.over, made.plugin, figures)
    await mishaps.tidy_up()
    if made.life != "managed":  # a rule that is left would meet the next start
        await asyncio.to_thread((await made.contract()).mend)


async def _still_answers(made: OllamaRig, figures: OllamaFigures) -> None:
    """Check that every service still answers."""
    model = "gpt-x" if made.life == "openai" else "tiny-chat"
    asked: list[tuple[str, dict[str, Any]]] = [
        *((service, ask_for(service, model, "say one")) for service in ("chat", "generate")),
        ("embed", {"input": "one"}),
    ]
    server = await made.contract()
    await asyncio.to_thread(server.mend)
    load = OllamaLoad(made, figures.tally, "afterwards", 1)
    works = [(service, made.client.invoke(service, request, timeout=_SLOWEST)) for service, request in asked]
    for what, work in (*works, ("leaving", load.leave(load.chance()))):
        try:
            await work
        except EnginePluginError as error:
            figures.wrong.append(f"afterwards, {what}: {type(error).__name__}: {error}")


async def _nothing_open(made: OllamaRig, figures: OllamaFigures) -> None:
    """Check that abandoned requests have ended at the server."""
    server = await made.contract()
    end = asyncio.get_running_loop().time() + _SETTLE
    while still := await asyncio.to_thread(server.requests, state="open"):
        if asyncio.get_running_loop().time() > end:
            figures.wrong.append(f"at the server go on: {[(entry['path'], entry['body']) for entry in still]}")
            return
        await asyncio.sleep(_LOOK)


# The end of the plugin


async def _death(plan: Plan, made: OllamaRig, figures: OllamaFigures, name: str) -> None:
    """Kill a plugin under load: it leaves no process, and no work at an attached server."""
    await made.client.start_engine(timeout=_SLOWEST)
    load = OllamaLoad(made, Tally(), f"{plan.seed} {made.life} {name}", plan.longest)
    works = [asyncio.ensure_future(work) for work in load.workers(figures.about["streams"])]
    try:
        await asyncio.sleep(_UNDER_LOAD)
        made.plugin.kill()
        await _all_gone(made, figures, name)
    finally:
        load.over.set()
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        await made.client.kill()


async def _host_gone(made: OllamaRig, figures: OllamaFigures) -> None:
    """Kill the host: the plugin ends with all its processes and cleans up."""
    environ = environment(made.scratch, made.theirs) | {MARK: made.mark}
    host = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.soak.lonely_host", str(made.scratch), made.mark, json.dumps(environ)),
        stdout=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
    )
    try:
        if host.stdout is None:
            raise RuntimeError("the host has no output")
        if not await asyncio.wait_for(host.stdout.readline(), _SLOWEST):
            figures.wrong.append("the plugin did not start with a host of its own")
        host.kill()
        await host.wait()
        await _all_gone(made, figures, "the host gone")
    finally:
        if host.returncode is None:
            host.kill()
            await host.wait()
    figures.left += left_behind(made.client, made.mark, made.scratch)


async def _all_gone(made: OllamaRig, figures: OllamaFigures, name: str) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    while left := processes_of(made.mark, MARK):
        if loop.time() > began + _AT_ONCE:
            figures.left += [f"{name}: process {_named(process)}" for process in left]
            break
        await asyncio.sleep(_LOOK)
    figures.ends.append(loop.time() - began)
    if made.life != "managed":
        await _nothing_open(made, figures)


async def _theirs_lives(made: OllamaRig, figures: OllamaFigures) -> None:
    """Check that the attached server still runs, and got no request from a plugin with a managed one."""
    if gone(made.theirs.process):
        figures.wrong.append("the attached server is gone")
        return
    if made.life == "managed" and (asked := await asyncio.to_thread(ContractClient(made.theirs.port).requests)):
        figures.wrong.append(f"the attached server got a request:  {asked[0]['path']}")


def _named(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {process.cmdline()}"
    except psutil.Error:
        return str(process.pid)
