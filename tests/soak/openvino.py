"""A soak of the default plugin: what leaks in the plugin and in its server."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import EnginePluginError
from tests.engines.openvino.driver.running import ONE_STEP, tone
from tests.patience import patience
from tests.soak.figures import Figures, at_rest, compared, mib
from tests.soak.openvino_load import OpenVinoLoad
from tests.soak.openvino_rig import MODELS, OpenVinoRig, openvino_rig
from tests.soak.phase import under_load
from tests.soak.tally import Tally

if TYPE_CHECKING:
    import psutil

    from tests.soak.rig import Snapshot
    from tests.soak.run import Plan

__all__ = ["OpenVinoFigures", "soak_openvino"]

_SLOWEST = patience(10)
_SERVER_NOISE = 20 << 20
_WORKER_NOISE = 40 << 20
ENGINE = {"threads": 1, "restart_backoff": 0.05, "restart_limit": 1000, "stable_time": 1, "drain_timeout": 3}


@dataclass(slots=True)
class OpenVinoFigures(Figures):
    """The plugin's figures, and those of its server and of the process that holds the chat model."""

    server_before: Snapshot | None = None
    server_after: Snapshot | None = None
    worker: list[int] = field(default_factory=list)
    """Resident bytes of the chat model's process, again and again."""

    @property
    def worker_growth(self) -> float:
        """Bytes between the medians of the first and the last third."""
        third = max(1, len(self.worker) // 3)
        return median(self.worker[-third:]) - median(self.worker[:third]) if self.worker else 0.0

    def problems(self) -> list[str]:
        found = Figures.problems(self)
        found += [f"the server: {problem}" for problem in compared(self.server_before, self.server_after)]
        before, after = self.server_before, self.server_after
        if before and after and after.rss > before.rss + _SERVER_NOISE:
            found.append(f"the server's memory at rest grew by {mib(after.rss - before.rss)}")
        if self.worker_growth > _WORKER_NOISE:
            found.append(f"the chat model's process grew by {mib(self.worker_growth)}")
        return found

    def to_json(self) -> dict[str, Any]:
        shape = Figures.to_json(self)
        shape["server_at_rest_before"] = at_rest(self.server_before)
        shape["server_at_rest_after"] = at_rest(self.server_after)
        sizes = [self.worker[min(len(self.worker) - 1, len(self.worker) * part // 4)] for part in range(5)]
        shape["chat_worker_mib"] = [round(size / (1 << 20), 1) for size in sizes] if self.worker else []
        return shape

    def text(self) -> str:
        shape = self.to_json()
        rows = [
            ("server at rest, before", shape["server_at_rest_before"]),
            ("server at rest, after", shape["server_at_rest_after"]),
            ("chat model's process", f"{shape['chat_worker_mib']} MiB"),
            ("counts", shape["counts"]),
        ]
        return "\n".join([*(f"{name}: {value}" for name, value in rows), Figures.text(self)])


async def soak_openvino(plan: Plan) -> OpenVinoFigures:
    """Run the whole soak. Nothing is left in any case."""
    figures = OpenVinoFigures({"seed": plan.seed, "streams": plan.streams}, Tally())
    try:
        async with asyncio.timeout(plan.limit + _SLOWEST), openvino_rig(ENGINE) as made:
            await _soak(plan, made, figures)
    except TimeoutError:
        figures.wrong.append(f"it had not come to its end after {plan.limit + _SLOWEST:g} s")
    return figures


async def _soak(plan: Plan, made: OpenVinoRig, figures: OpenVinoFigures) -> None:
    await _phase(plan, made, "warm-up", plan.warm_up, OpenVinoFigures({}, Tally()))
    before = await made.rest()
    server = made.server
    await _phase(plan, made, "load", plan.seconds, figures)
    await _still_answers(made, figures)
    after = await made.rest(before)
    if made.server is not server:
        figures.wrong.append("the server is another one than before")
    # Its server is the one process that a plugin at rest has here.
    figures.before, figures.after = (replace(one[0], children=one[0].children - 1) for one in (before, after))
    figures.server_before, figures.server_after = before[1], after[1]
    await made.client.stop_engine(timeout=_SLOWEST)
    if left := made.plugin.process.children(recursive=True):
        figures.wrong.append(f"{len(left)} processes with the engine stopped")
    figures.left = await made.end()
    figures.complaints = made.log.complaints


async def _phase(plan: Plan, made: OpenVinoRig, name: str, seconds: float, figures: OpenVinoFigures) -> None:
    for model in MODELS.values():  # chat is the first
        await made.client.load_model(model, timeout=_SLOWEST)
    load = OpenVinoLoad(made, figures.tally, f"{plan.seed} {name}")
    chat = next(iter(made.workers().values()))
    look = partial(_look_at, chat, figures)
    await under_load(name, seconds, load.workers(plan.streams), load.over, made.plugin.process, figures, look)


def _look_at(chat: psutil.Process, figures: OpenVinoFigures) -> None:
    figures.worker.append(chat.memory_info().rss)


async def _still_answers(made: OpenVinoRig, figures: OpenVinoFigures) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        ("chat", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("generate", {"prompt": "a", "max_tokens": 2}),
        ("embed", {"input": "one"}),
        ("rerank", {"query": "b", "documents": ["c"]}),
        ("text-to-image", ONE_STEP),
        ("speech-to-text", {"audio": tone(1)}),
        ("text-to-speech", {"text": "hello"}),
    ]
    for service, request in asked:
        try:
            await made.client.invoke(service, request, timeout=_SLOWEST)
        except EnginePluginError as error:
            figures.wrong.append(f"afterwards, {service}: {type(error).__name__}: {error}")
