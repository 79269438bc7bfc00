"""One phase of a soak: all work at once for so many seconds, with samples taken."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from tests.soak.figures import Figures, Sample, mib

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    import psutil

__all__ = ["under_load"]

_LOOK = 0.25
_TELL = 10


async def under_load(
    name: str,
    seconds: float,
    works: Iterable[Coroutine[Any, Any, None]],
    over: asyncio.Event,
    plugin: psutil.Process,
    figures: Figures,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Run `works` for so many seconds, then set `over` and wait for their end. The plugin's process is looked at
    again and again for the figures; `look` is called then, too."""
    figures.tally.loaded()
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(work)
        while (passed := loop.time() - began) < seconds:
            begun = figures.tally.counts["streams begun"]
            sample = Sample(loop.time(), begun, plugin.memory_info().rss, plugin.num_fds())
            if not figures.samples or passed // _TELL != (figures.samples[-1].at - began) // _TELL:
                _tell(f"{name} {passed:4.0f} s", sample, figures)
            figures.samples.append(sample)
            look()
            await asyncio.sleep(_LOOK)
        figures.tally.heard()
        figures.seconds = loop.time() - began
        over.set()


def _tell(when: str, sample: Sample, figures: Figures) -> None:
    counts = {what: count for what, count in figures.tally.counts.items() if ": " not in what}
    sys.stderr.write(f"{when}: {counts}, {mib(sample.rss)}, {sample.fds} descriptors\n")
