"""The benchmarks run, print their tables, and leave nothing. No figure is checked here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.results import DIRECT, PLUGIN, Results, Row, Spread
from tests.patience import patience

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]

PAIRS = (("direct", "plugin"), ("in-process", "server"), ("without text", "server"), ("server", "plugin"))

ADDED = Row("group", "latency", "ms", "added")
RATIO = Row("group", "tokens/s", "1/s", "ratio")


@pytest.fixture
def marked(tmp_path: Path) -> dict[str, str]:
    """An environment with a mark that every process of a run inherits."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PLUGIN_")}
    environ["BENCHMARK_TEST"] = str(tmp_path)
    return environ


def _left_over(mark: str) -> list[str]:
    """Return the processes with the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("BENCHMARK_TEST") == mark:
                found.append(f"{process.pid} {process.cmdline()}")
        except psutil.Error:
            continue  # another user's, or gone
    return found


def _ways(row: dict[str, Any]) -> tuple[str, ...]:
    return next(pair for pair in PAIRS if set(pair) <= row.keys())


def _quick_run(marked: dict[str, str], tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The figures of a quick run that went well: each stands in the table, and is possible."""
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", str(file), *arguments],
        cwd=REPOSITORY,
        env=marked,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=patience(30),
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rows = {(row["group"], row["title"]): row for row in figures["rows"]}
    assert len(rows) == len(figures["rows"])
    for row in figures["rows"]:
        assert row["title"] in done.stdout
        for way in _ways(row) if row in _compared(figures) else ():
            assert row[way]["samples"] > 0
            assert 0 < row[way]["p10"] <= row[way]["median"] <= row[way]["p90"]
    assert str(REPOSITORY) not in done.stdout + file.read_text(encoding="utf-8")
    assert _left_over(marked["BENCHMARK_TEST"]) == []
    return figures


def _compared(figures: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in figures["rows"] if "added" in row or "ratio" in row]


def test_quick_run_measures_all_ways_and_leaves_no_process(marked: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("openvino_genai")
    figures = _quick_run(marked, tmp_path)

    assert {"processor", "Python", "grpcio", "xllamacpp", "openvino-genai"} <= figures["machine"].keys()
    compared = {pair: sum(_ways(row) == pair for row in _compared(figures)) for pair in PAIRS}
    assert min(compared.values()) >= 9, compared
    assert sum("/v2/health/ready" in row["title"] for row in figures["rows"]) == 2


def test_ollama_is_measured_in_both_flavors(marked: dict[str, str], tmp_path: Path) -> None:
    figures = _quick_run(marked, tmp_path, "--engine", "ollama")

    groups = [row["group"] for row in figures["rows"]]
    assert sorted(set(groups)) == ["Ollama's stand-in, Ollama's own JSON", "Ollama's stand-in, OpenAI's JSON"]
    for group in set(groups):
        titles = [row["title"] for row in _compared(figures) if row["group"] == group]
        assert {"first token of a stream", "a token's way, 64 streams, one each 20 ms"} < set(titles)
        assert [title for title in titles if title.startswith("1000 tokens/s")] == [
            "1000 tokens/s, 1 stream",
            "1000 tokens/s, 16 streams",
            "1000 tokens/s, 64 streams",
        ]


def test_plugin_is_compared_within_a_round() -> None:
    results = Results()
    for direct in (1.0, 10.0, 100.0):  # the machine is slower from round to round; the plugin adds the same
        results.begin_round()
        results.add(ADDED, DIRECT, [direct, direct, direct * 5])
        results.add(ADDED, PLUGIN, [direct + 2])
        results.add(RATIO, PLUGIN, [direct / 2])
        results.add(RATIO, DIRECT, [direct])

    assert results.compared(ADDED) == Spread(2, 2, 2, 3)
    assert results.compared(RATIO) == Spread(0.5, 0.5, 0.5, 3)
    whole = results.spread(ADDED, DIRECT)
    assert whole is not None
    assert whole.samples == 9
    assert whole.median == 10


def test_row_with_one_way_is_not_compared() -> None:
    results = Results()
    results.begin_round()
    results.add(ADDED, PLUGIN, [1.0])

    assert results.compared(ADDED) is None
    assert results.spread(ADDED, DIRECT) is None
    assert results.to_json()[0]["plugin"] == {"median": 1.0, "p10": 1.0, "p90": 1.0, "samples": 1}


def test_spread_interpolates_between_samples() -> None:
    spread = Spread.of([4, 1, 2, 3, 5])

    assert (spread.median, spread.samples) == (3, 5)
    assert (spread.p10, spread.p90) == pytest.approx((1.4, 4.6))
