"""`python -m benchmarks [--quick] [--json FILE]`: measure, print the table, leave nothing behind."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import machine
from benchmarks.measures import Sizes, memory, real_round, start_round, synthetic_round
from benchmarks.report import table
from benchmarks.results import Results, Spread
from benchmarks.targets import rig, stand_in, write_plugin
from engine_plugin.errors import EnginePluginError

if TYPE_CHECKING:
    from benchmarks.targets import Rig

__all__ = ["main", "measure"]

FULL = Sizes(
    calls=30,
    concurrent_calls=160,
    real_tokens=512,
    synthetic_tokens=20_000,
    paced_tokens=50,
    idle_seconds=2.0,
)
QUICK = Sizes(
    calls=3,
    concurrent_calls=16,
    real_tokens=32,
    synthetic_tokens=2000,
    paced_tokens=5,
    idle_seconds=0.1,
)
_ROUNDS = 12
_NO_NEW_ROUND_AFTER = 180.0  # seconds; a slow machine gets fewer rounds
_LIMIT = 240.0

# One thread computes, so that on a small machine the plugin and its host have a core too.
_REAL = {"backend": "xllamacpp", "parallel": 16, "threads": 1, "max_loaded_models": 2, "start_limit": 30}
_SYNTHETIC = {"backend": "llama-server", "parallel": 64, "max_loaded_models": 1, "start_limit": 30}


async def measure(sizes: Sizes, rounds: int) -> Results:
    """A whole run, its processes and files gone afterwards. Raises TimeoutError after four minutes."""
    results = Results()
    began = time.monotonic()
    async with asyncio.timeout(_LIMIT), AsyncExitStack() as cleanup:
        # Below the system's temporary directory, for a unix socket's path must be short.
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="ep-bench-")))
        sockets = scratch / "s"
        sockets.mkdir(mode=0o700)
        bare = write_plugin(scratch / "bare", {}).parent
        real = await cleanup.enter_async_context(rig(scratch / "real", sockets, _REAL))
        fake = {**_SYNTHETIC, "llama_server": stand_in(scratch / "bin")}
        synthetic = await cleanup.enter_async_context(rig(scratch / "synthetic", sockets, fake))
        await _warm_up(sizes, real, synthetic)
        for turn in range(rounds):
            if turn and time.monotonic() - began > _NO_NEW_ROUND_AFTER:
                break
            results.begin_round()
            results.others.append(await machine.busy(sizes.idle_seconds / 4))
            await real_round(results, real, sizes)
            await synthetic_round(results, synthetic, sizes)
            await start_round(results, bare, sizes)
        memory(results, real, synthetic)
    return results


async def _warm_up(sizes: Sizes, real: Rig, synthetic: Rig) -> None:
    """A round whose samples are thrown away: caches, connections and first imports do not count."""
    if sizes is QUICK:
        return
    results = Results()
    results.begin_round()
    await real_round(results, real, QUICK)
    await synthetic_round(results, synthetic, QUICK)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure what the plugin costs.")
    parser.add_argument("--quick", action="store_true", help="one small round: shows that it works, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    try:
        results = asyncio.run(measure(QUICK if options.quick else FULL, 1 if options.quick else _ROUNDS))
    except (EnginePluginError, TimeoutError) as error:
        print(f"benchmarks: {error or f'not done in {_LIMIT:g} s'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    others = Spread.of(results.others)
    about = {
        **machine.describe(),
        "rounds": str(results.rounds),
        "processor in use by others before a round": f"{others.median:.0f} %, at most {max(results.others):.0f} %",
    }
    print(table(results, about), end="")
    if options.json:
        shape = {"machine": about, "rows": results.to_json()}
        options.json.write_text(json.dumps(shape, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
