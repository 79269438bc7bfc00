"""`python -m benchmarks [--quick] [--json FILE]`: measure, print the table, leave nothing behind."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import machine
from benchmarks.measures import Sizes, memory, real_round, start_round, synthetic_round
from benchmarks.ollama import flavors, ollama_round
from benchmarks.openvino import Load, lineup, loads, openvino_round
from benchmarks.report import table
from benchmarks.results import Results, Spread
from benchmarks.targets import REPOSITORY, rig, stand_in, write_plugin
from engine_plugin.errors import EnginePluginError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from benchmarks.targets import Rig

__all__ = ["main", "measure_llamacpp", "measure_ollama", "measure_openvino"]

FULL = Sizes(
    calls=30,
    concurrent_calls=160,
    real_tokens=512,
    synthetic_tokens=20_000,
    paced_tokens=50,
    idle_seconds=2.0,
    streaming_seconds=1.5,
)
QUICK = Sizes(
    calls=3,
    concurrent_calls=16,
    real_tokens=32,
    synthetic_tokens=2000,
    paced_tokens=5,
    idle_seconds=0.1,
    streaming_seconds=0.1,
)
_ENGINES = ("llamacpp", "ollama", "openvino")
_ROUNDS = 12
_NO_NEW_ROUND_AFTER = 180.0  # seconds; a slow machine gets fewer rounds
_LIMIT = 240.0

# One thread computes, so that on a small machine the plugin and its host have a core too.
_REAL = {"backend": "xllamacpp", "parallel": 16, "threads": 1, "max_loaded_models": 2, "start_limit": 30}
_TINY = REPOSITORY / "engine_plugin" / "samples" / "openvino" / "tiny-chat"
_THREADS = 1
_SYNTHETIC = {"backend": "llama-server", "parallel": 64, "max_loaded_models": 1, "start_limit": 30}


@asynccontextmanager
async def _scratch() -> AsyncIterator[tuple[Path, Path]]:
    """A directory and one for sockets in it, for no more than four minutes (TimeoutError)."""
    # Below the system's temporary directory, for a unix socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="ep-bench-") as name:
        sockets = Path(name) / "s"
        sockets.mkdir(mode=0o700)
        async with asyncio.timeout(_LIMIT):
            yield Path(name), sockets


async def _rounds(results: Results, sizes: Sizes, limit: int) -> AsyncIterator[None]:
    """Once for each round that there is time for."""
    began = time.monotonic()
    for turn in range(limit):
        if turn and time.monotonic() - began > _NO_NEW_ROUND_AFTER:
            break
        results.begin_round()
        results.others.append(await machine.busy(sizes.idle_seconds / 4))
        yield


async def measure_llamacpp(sizes: Sizes, rounds: int) -> Results:
    """A run with llama.cpp, its processes and files gone afterwards. Raises TimeoutError after four minutes."""
    results = Results()
    async with _scratch() as (scratch, sockets), AsyncExitStack() as cleanup:
        bare = write_plugin(scratch / "bare", {}).parent
        real = await cleanup.enter_async_context(rig(scratch / "real", sockets, _REAL))
        fake = {**_SYNTHETIC, "llama_server": stand_in(scratch / "bin")}
        synthetic = await cleanup.enter_async_context(rig(scratch / "synthetic", sockets, fake))
        await _warm_up(sizes, real, synthetic)
        async for _ in _rounds(results, sizes, rounds):
            await real_round(results, real, sizes)
            await synthetic_round(results, synthetic, sizes)
            await start_round(results, bare, sizes)
        memory(results, real, synthetic)
    return results


async def measure_openvino(sizes: Sizes, rounds: int, model: Path, threads: int) -> Results:
    """A run with OpenVINO, its processes and files gone afterwards. Raises TimeoutError after four minutes."""
    results = Results()
    async with _scratch() as (scratch, sockets), lineup(scratch, sockets, model, threads) as line:
        work = await loads(line.ways[0], sizes.streaming_seconds)
        await openvino_round(_thrown_away(), line, [Load(load.width, 16) for load in work], 1, model.name)
        async for _ in _rounds(results, sizes, rounds):
            await openvino_round(results, line, work, sizes.calls, model.name)
    return results


async def measure_ollama(sizes: Sizes, rounds: int) -> Results:
    """A run with a stand-in for Ollama, its processes and files gone afterwards. Raises TimeoutError after four
    minutes."""
    results = Results()
    async with _scratch() as (scratch, _), flavors(scratch) as both:
        if sizes is not QUICK:
            await ollama_round(_thrown_away(), both, QUICK)
        async for _ in _rounds(results, sizes, rounds):
            await ollama_round(results, both, sizes)
    return results


def _thrown_away() -> Results:
    """For a round whose samples do not count: caches, connections and first imports."""
    results = Results()
    results.begin_round()
    return results


async def _warm_up(sizes: Sizes, real: Rig, synthetic: Rig) -> None:
    if sizes is QUICK:
        return
    results = _thrown_away()
    await real_round(results, real, QUICK)
    await synthetic_round(results, synthetic, QUICK)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure what the plugin costs.")
    parser.add_argument("--quick", action="store_true", help="one small round: shows that it works, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--engine", choices=("all", *_ENGINES), default="all")
    parser.add_argument("--model", type=Path, default=_TINY, help="OpenVINO: the directory of a chat model")
    parser.add_argument("--threads", type=int, default=_THREADS, help="OpenVINO: threads that compute; 0: its choice")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="at most so many")
    return parser.parse_args(arguments)


async def _measure(options: argparse.Namespace) -> list[Results]:
    """What was asked for, one engine after the other."""
    sizes, rounds = (QUICK, 1) if options.quick else (FULL, options.rounds)
    found = []
    if options.engine in ("all", "llamacpp"):
        found.append(await measure_llamacpp(sizes, rounds))
    if options.engine in ("all", "ollama"):
        found.append(await measure_ollama(sizes, rounds))
    if options.engine in ("all", "openvino"):
        found.append(await measure_openvino(sizes, rounds, options.model.resolve(), options.threads))
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    options = _options(arguments)
    try:
        measured = asyncio.run(_measure(options))
    except (EnginePluginError, TimeoutError, RuntimeError) as error:
        print(f"benchmarks: {error or f'not done in {_LIMIT:g} s'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    busy = [share for results in measured for share in results.others]
    about = {
        **machine.describe(),
        "rounds": ", ".join(str(results.rounds) for results in measured),
        "processor in use by others before a round": f"{Spread.of(busy).median:.0f} %, at most {max(busy):.0f} %",
    }
    if options.engine in ("all", "openvino"):
        about["OpenVINO's threads"] = str(options.threads or "its choice")
    print(table(measured, about), end="")
    if options.json:
        rows = [row for results in measured for row in results.to_json()]
        shape = {"machine": about, "rows": rows}
        options.json.write_text(json.dumps(shape, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
