"""Run a soak: `python -m tests.soak [--engine E] [--minutes 3] [--streams 200] [--seed N] [--json FILE]`.

The exit status is 0 when nothing is left and nothing unexpected happened, 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.patience import patience
from tests.soak.run import Plan, soak

if TYPE_CHECKING:
    from tests.soak.figures import Figures
    from tests.soak.ollama import BothLives

__all__ = ["main"]


_CLEANING_UP = patience(20)
_STREAMS = {"llamacpp": 200, "ollama": 80, "openai": 40, "openvino": 8}


async def _soak(plan: Plan, engine: str) -> Figures | BothLives:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("not in a task")
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    if engine in ("ollama", "openai"):
        from tests.soak.ollama import LIVES, soak_ollama

        return await soak_ollama(plan, LIVES if engine == "ollama" else ("openai",))
    if engine == "openvino":
        from tests.soak.openvino import soak_openvino

        return await soak_openvino(plan)
    return await soak(plan)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Load the plugin, hurt its engines.")
    parser.add_argument("--engine", choices=sorted(_STREAMS), default="llamacpp", help="whose plugin (llamacpp)")
    parser.add_argument("--minutes", type=float, default=3.0, help="of load, warm-up included (3)")
    parser.add_argument(
        "--streams", type=int, default=None, help="at once (200; ollama: 80 in both lives; openai: 40; openvino: 8)"
    )
    parser.add_argument("--seed", type=int, default=None, help="of all that is left to chance (another each time)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    if sys.platform == "win32":
        print("The soak's engines are ended and frozen by signals, which Windows does not have.", file=sys.stderr)
        return 1
    seed = int(time.time()) if options.seed is None else options.seed
    print(f"seed {seed}", file=sys.stderr)
    plan = Plan.of(options.minutes, options.streams or _STREAMS[options.engine], seed)
    # Should even the end of it hang: say where, and go. A plugin whose host has gone ends by itself.
    faulthandler.dump_traceback_later(plan.limit + _CLEANING_UP, exit=True)
    try:
        figures = asyncio.run(_soak(plan, options.engine))
    except asyncio.CancelledError:
        return 130
    finally:
        faulthandler.cancel_dump_traceback_later()
    print(figures.text())
    if options.json:
        options.json.write_text(json.dumps(figures.to_json(), indent=2) + "\n", encoding="utf-8")
    return 1 if figures.problems() else 0


if __name__ == "__main__":
    sys.exit(main())
