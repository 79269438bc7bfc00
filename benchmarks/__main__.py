"""`python -m benchmarks [--quick] [--peer DIR] [--json FILE]`: measure, print the table, leave nothing behind."""

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
from benchmarks.baseline import BASELINE, ratios, worse
from benchmarks.measures import Sizes, streams
from benchmarks.ollama import flavors, ollama_round, prepare
from benchmarks.openvino import Load, lineup, loads, openvino_round
from benchmarks.plot import plot
from benchmarks.processes import left_alone, start_round
from benchmarks.programs import built_is_current, ours, read_peer
from benchmarks.pulls import puller
from benchmarks.report import table
from benchmarks.results import Results, Spread
from benchmarks.rounds import REAL, STAND_IN, calls_round, memory, real_round, streams_round
from benchmarks.targets import REPOSITORY, rig, stand_in
from engine_plugin.errors import EnginePluginError
from engine_plugin.rpc.choice import use_grpcio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from benchmarks.targets import Rig

__all__ = ["main", "measure_llamacpp", "measure_ollama", "measure_openvino", "measure_process"]

FULL = Sizes(
    calls=30,
    concurrent_calls=320,
    real_tokens=512,
    synthetic_tokens=20_000,
    paced_tokens=50,
    idle_seconds=2.0,
    streaming_seconds=1.5,
    pulled=256,
    messages=(1, 64),
)
QUICK = Sizes(
    calls=3,
    concurrent_calls=16,
    real_tokens=32,
    synthetic_tokens=2000,
    paced_tokens=5,
    idle_seconds=0.1,
    streaming_seconds=0.1,
    pulled=2,
    messages=(1,),
)
_PARTS = ("llamacpp", "ollama", "openvino", "process")
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
        real = await cleanup.enter_async_context(rig(scratch / "real", sockets, _REAL))
        fake = {**_SYNTHETIC, "llama_server": stand_in(scratch / "bin")}
        synthetic = await cleanup.enter_async_context(rig(scratch / "synthetic", sockets, fake))
        await _warm_up(sizes, real, synthetic)
        async for _ in _rounds(results, sizes, rounds):
            await real_round(results, real, sizes)
            await calls_round(results, synthetic, sizes, STAND_IN)
            await streams_round(results, synthetic, sizes, STAND_IN)
        memory(results, real, REAL)
        memory(results, synthetic, STAND_IN)
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


async def measure_ollama(sizes: Sizes, rounds: int, peer: Path | None = None) -> Results:
    """A run with a stand-in for Ollama, its processes and files gone afterwards. Raises TimeoutError after four
    minutes."""
    results = Results()
    async with _scratch() as (scratch, _):
        other = read_peer(peer, scratch) if peer else None
        async with flavors(scratch, other) as all_flavors:
            if sizes is not QUICK:
                await prepare(all_flavors[0], sizes)
                await ollama_round(_thrown_away(), all_flavors, QUICK)
            async for _ in _rounds(results, sizes, rounds):
                await ollama_round(results, all_flavors, sizes)
            for flavor in all_flavors:
                memory(results, flavor.rig, flavor.group)
    return results


async def measure_process(sizes: Sizes, rounds: int, peer: Path | None = None) -> Results:
    """A run of what concerns no engine: starts, idle plugins and pulls. Raises TimeoutError after four minutes."""
    results = Results()
    async with _scratch() as (scratch, _), AsyncExitStack() as cleanup:
        programs = ours(scratch, both=peer is not None)
        programs += [read_peer(peer, scratch).program] if peer else []
        pulls = await cleanup.enter_async_context(puller(scratch, sizes.pulled))
        await start_round(_thrown_away(), programs)
        await cleanup.enter_async_context(left_alone(results, programs, sizes.idle_seconds))
        async for _ in _rounds(results, sizes, rounds):
            await start_round(results, programs)
            if pulls is not None:
                await pulls.round(results)
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
    await streams(synthetic.direct, synthetic.direct.chat(sizes.synthetic_tokens), 1)  # which the stand-in keeps
    await streams_round(results, synthetic, QUICK, STAND_IN)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure what the plugin costs.")
    parser.add_argument("--quick", action="store_true", help="one small round: shows that it works, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the comparisons there, as SVG")
    parser.add_argument("--check", action="store_true", help="fail when a ratio is far worse than in the baseline")
    parser.add_argument("--save", action="store_true", help="write this run's ratios as the baseline")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="another plugin for Ollama, measured beside ours")
    parser.add_argument("--engine", choices=_PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--model", type=Path, default=_TINY, help="OpenVINO: the directory of a chat model")
    parser.add_argument("--threads", type=int, default=_THREADS, help="OpenVINO: threads that compute; 0: its choice")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="at most so many")
    return parser.parse_args(arguments)


def _parts(options: argparse.Namespace) -> tuple[str, ...]:
    """What is measured."""
    about_ollama = options.peer or options.check or options.save
    return tuple(options.engine or (("ollama", "process") if about_ollama else _PARTS))


async def _measure(options: argparse.Namespace) -> list[Results]:
    """What was asked for, one part after the other."""
    sizes, rounds = (QUICK, 1) if options.quick else (FULL, options.rounds)
    peer = options.peer.resolve() if options.peer else None
    found = []
    for part in _parts(options):
        if part == "llamacpp":
            found.append(await measure_llamacpp(sizes, rounds))
        elif part == "ollama":
            found.append(await measure_ollama(sizes, rounds, peer))
        elif part == "openvino":
            found.append(await measure_openvino(sizes, rounds, options.model.resolve(), options.threads))
        else:
            found.append(await measure_process(sizes, rounds, peer))
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
    about = _about(options, measured)
    print(table(measured, about), end="")
    rows = [row for results in measured for row in results.to_json()]
    if options.json:
        shape = {"machine": about, "rows": rows}
        options.json.write_text(json.dumps(shape, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.plot:
        options.plot.write_text(plot(rows), encoding="utf-8")
    if options.save:
        BASELINE.write_text(json.dumps(ratios(rows), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.check:
        complaints = list(worse(rows, json.loads(BASELINE.read_text(encoding="utf-8"))))
        print("\n" + "\n".join(complaints or ["No ratio is far worse than the baseline's."]))
        return 1 if complaints else 0
    return 0


def _about(options: argparse.Namespace, measured: list[Results]) -> dict[str, str]:
    """What the figures were measured on."""
    busy = [share for results in measured for share in results.others]
    about = {
        **machine.describe(),
        "rounds": ", ".join(str(results.rounds) for results in measured),
        "processor in use by others before a round": f"{Spread.of(busy).median:.0f} %, at most {max(busy):.0f} %",
    }
    parts = _parts(options)
    if "openvino" in parts:
        about["OpenVINO's threads"] = str(options.threads or "its choice")
    if {"ollama", "process"} & set(parts):
        about["the host's gRPC"] = "grpcio" if use_grpcio() else "native"
        about["the plugin for Ollama"] = "built" if built_is_current() else "this checkout, by a launcher"
    return about


if __name__ == "__main__":
    sys.exit(main())
