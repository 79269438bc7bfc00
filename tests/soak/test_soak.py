"""The soak itself for some seconds: the same code with fewer streams and more frequent faults."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.engines.llamacpp.running import REPOSITORY, eventually, processes_of
from tests.patience import LIMIT, pace
from tests.soak.figures import SILENCE, Figures, Sample
from tests.soak.ollama import soak_ollama
from tests.soak.rig import Snapshot
from tests.soak.run import Plan, soak
from tests.soak.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.soak.ollama_rig import Life

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="engines are hurt by signals")

SHORT = Plan(seconds=4.0, warm_up=2.0, streams=50, seed=7, pace=0.2, longest=20, interval=0.05)
SHORT_OF_OTHERS = Plan(seconds=6.0, warm_up=1.0, streams=12, seed=7, pace=0.3, longest=20, deaths=1)
OTHERS = ("managed", "openai")
REST = Snapshot(60 << 20, {"sockets": 8}, 0, 14, {"a": 2}, {"MainThread": 1, "asyncio_N": 3}, 1000, {"x": 1000})


def at_pace(plan: Plan) -> Plan:
    """The plan with the time that this machine needs for as much work."""
    return replace(plan, seconds=pace(plan.seconds), warm_up=pace(plan.warm_up))


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory with a path short enough for sockets, empty at the end."""
    with tempfile.TemporaryDirectory(prefix="et-") as name:
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(name)
        assert list(Path(name).iterdir()) == []


@pytest.mark.promise("P4", "P5", "P12")
@pytest.mark.slow
@posix_only
async def test_short_soak_is_clean(scratch: Path) -> None:
    figures = await soak(at_pace(SHORT))
    assert figures.problems() == [], figures.text()
    counts = figures.tally.counts
    for what in ("streams completed", "streams cancelled", "unary calls completed", "engines killed", "pulls"):
        assert counts[what] > 0, figures.text()
    assert figures.restarts > 0
    assert figures.cancel_seen
    assert json.loads(json.dumps(figures.to_json()))["seed"] == 7
    assert figures.text().endswith("CLEAN")


@pytest.mark.promise("F3", "P2", "P5", "P11", "P12", "P32")
@pytest.mark.slow
@posix_only
@pytest.mark.parametrize("life", ["attached", *(pytest.param(life, marks=pytest.mark.thorough) for life in OTHERS)])
async def test_short_soak_of_other_servers_is_clean(life: Life, scratch: Path) -> None:
    both = await soak_ollama(at_pace(SHORT_OF_OTHERS), (life,))
    assert both.problems() == [], both.text()
    figures = both.lives[life]
    counts = figures.tally.counts
    for what in ("streams completed", "streams cancelled", "streams that fail", "unary calls completed"):
        assert counts[what] > 0, both.text()
    assert counts["pulls"] > 0 or life == "openai"
    assert counts["engines killed"] > 0, both.text()
    assert figures.cancel_seen
    assert len(figures.ends) == SHORT_OF_OTHERS.deaths + 1
    assert json.loads(json.dumps(both.to_json()))[life]["seed"] == 7
    assert both.text().endswith("CLEAN")


@pytest.mark.slow
@posix_only
async def test_interrupted_soak_leaves_no_process(scratch: Path) -> None:
    environ = os.environ | {"SOAK_TEST": str(scratch)}
    command = [sys.executable, "-m", "tests.soak", "--minutes", "1", "--streams", "5"]
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, cwd=REPOSITORY, env=environ, stderr=quiet)
    try:
        await eventually(lambda: len(processes_of(str(scratch), "SOAK_TEST")) > 3, 30)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(LIMIT):
            assert await process.wait() == 130
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert processes_of(str(scratch), "SOAK_TEST") == []


# What is judged


def figures(**changes: object) -> Figures:
    """Return the figures of a clean soak, with changes in the final snapshot."""
    tally = Tally(Counter({"streams completed": 5, "streams begun": 5}))
    samples = [Sample(float(at), at * 100, 60 << 20, 20) for at in range(30)]
    after = replace(REST, **changes)  # type: ignore[arg-type]  # whatever a test changes
    return Figures({"seed": 1, "streams": 2}, tally, samples, REST, after, seconds=1.0)


def test_soak_without_growth_is_clean() -> None:
    assert figures().problems() == []
    grown = {"rss": 62 << 20, "objects": 1200, "threads": {"MainThread": 1, "asyncio_N": 6}, "native_threads": 16}
    assert figures(**grown).problems() == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fds": {"sockets": 9}}, "descriptors that were not there before: {'sockets': 1}"),
        ({"tasks": {"a": 2, "b": 1}}, "tasks that were not there before: {'b': 1}"),
        ({"threads": {"MainThread": 1, "stray": 1}}, "threads that were not there before: {'stray': 1}"),
        ({"children": 1}, "1 processes with the engine stopped"),
        ({"native_threads": 40}, "threads went from 14 to 40"),
        ({"objects": 9000, "kinds": {"x": 1000, "y": 8000}}, "live objects went from 1000 to 9000: {'y': 8000}"),
    ],
)
def test_growth_at_rest_is_a_problem(changes: dict[str, object], problem: str) -> None:
    assert figures(**changes).problems() == [problem]


def test_memory_growth_per_stream_is_a_problem() -> None:
    leaking = figures()
    leaking.samples = [Sample(float(at), at * 100, (60 << 20) + at * 100 * 5000, 20) for at in range(30)]
    assert round(leaking.per_1000) == 5_000_000
    [problem] = leaking.problems()
    assert problem.startswith("memory grew by")
    # A step that is taken once is no leak.
    leaking.samples = [Sample(float(at), at * 100, (60 + 4 * (at > 12)) << 20, 20) for at in range(30)]
    assert leaking.problems() == []


def test_surprise_is_kept_with_its_text() -> None:
    found = figures(children=0)
    found.tally.failed("stream, whole", ValueError("odd"), (502, 503))
    found.left = ["temporary: engine-plugin-x"]
    found.tally.longest_silence = 2 * SILENCE
    assert found.problems() == [
        "1 × stream, whole: ValueError (0): odd",
        "left behind: temporary: engine-plugin-x",
        f"no stream was completed for {2 * SILENCE:.1f} s",
    ]
