"""The benchmarks run, print their tables, and leave nothing. Of the figures only the number of faults is checked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest
import yaml

from benchmarks.baseline import worse
from benchmarks.plot import plot
from benchmarks.programs import read_peer
from benchmarks.results import DIRECT, PLUGIN, Results, Row, Spread
from benchmarks.rounds import FAULTY
from engine_plugin.manifest import platform_key
from tests.patience import patience

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]

PAIRS = (("direct", "plugin"), ("in-process", "server"), ("without text", "server"), ("server", "plugin"))

ADDED = Row("group", "latency", "ms", "added")
RATE = Row("group", "tokens/s", "1/s", "rate")
BESIDE = Row("group", "memory", "MiB", "cost", (DIRECT, PLUGIN, "peer"))


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
        for spread in row["ways"].values() if row["compare"] else ():
            assert spread is None or 0 <= spread["p10"] <= spread["median"] <= spread["p90"] <= spread["most"]
        if row["title"] == FAULTY:
            assert [row["ways"][way]["most"] for way in (DIRECT, PLUGIN)] == [0, 0]
    assert str(REPOSITORY) not in done.stdout + file.read_text(encoding="utf-8")
    assert _left_over(marked["BENCHMARK_TEST"]) == []
    return figures


def _compared(figures: dict[str, Any], *ways: str) -> list[str]:
    """The titles of the rows with samples of both ways."""
    rows = [row for row in figures["rows"] if row["compare"] and set(ways) <= row["ways"].keys()]
    return [row["title"] for row in rows if all(row["ways"][way] for way in ways)]


def _texts(picture: str) -> set[str | None]:
    drawn = ElementTree.fromstring(picture)  # noqa: S314  # our own
    return {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}


def _peer(folder: Path, port: int) -> Path:
    """Another plugin: ours, attached to a server at that port, in a directory as hosts know them."""
    command = [sys.executable, "scripts/build.py", "--linked", "--output", str(folder), "plugins/ollama/plugin.yaml"]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=patience(30))
    manifest = folder / "ollama-plugin" / "plugin.yaml"
    shape = yaml.safe_load(manifest.read_text(encoding="utf-8"))
    shape["provider"]["engine_host"] = f"http://127.0.0.1:{port}"
    shape["engine"]["server"] = "attach"
    for service in shape["services"]:
        service["config_ref"] = f"ollama:{service['service_name']}"
    manifest.write_text(yaml.safe_dump(shape), encoding="utf-8")
    return manifest.parent


def test_quick_run_measures_all_ways_and_leaves_no_process(marked: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("openvino_genai")
    figures = _quick_run(marked, tmp_path, "--engine", "llamacpp", "--engine", "openvino")

    assert {"processor", "Python", "grpcio", "xllamacpp", "openvino-genai"} <= figures["machine"].keys()
    compared = {pair: len(_compared(figures, *pair)) for pair in PAIRS}
    assert min(compared.values()) >= 9, compared
    assert sum("/v2/health/ready" in row["title"] for row in figures["rows"]) == 2


def test_another_plugin_is_measured_beside_ours_in_every_case(
    marked: dict[str, str], tmp_path: Path, unused_tcp_port: int
) -> None:
    picture = tmp_path / "figures.svg"
    peer = _peer(tmp_path / "peer", unused_tcp_port)
    figures = _quick_run(marked, tmp_path, "--peer", str(peer), "--plot", str(picture))

    pulls = ["pulling a model"] if shutil.which("curl") and find_spec("xllamacpp") else []
    groups = {"Ollama's stand-in, Ollama's own JSON", "the plugin's process", *pulls}
    assert {row["group"] for row in figures["rows"]} == groups
    titles = _compared(figures, "plugin", "peer")
    for case in (
        *("an empty rpc", "chat of 1 token", "requests/s, 16 callers", "requests/s, 64 callers"),
        *("embed, batch of 1", "embed, batch of 32", "embed, batch of 256", "request of 1 MiB", "answer of 1 MiB"),
        *("first token", "1000 tokens/s, 1 stream", "1000 tokens/s, 16", "1000 tokens/s, 64", "1000 tokens/s, 256"),
        *("processor seconds a million tokens, 64", "a token's way", "start to handshake", "start to the first rpc"),
        *("memory (RSS) when started", "threads when started"),
    ):
        assert any(title.startswith(case) for title in titles), case
    assert _texts(picture.read_text(encoding="utf-8")) >= {"the plugin's process", "peer"}


def test_both_flavors_of_ollama_are_measured(marked: dict[str, str], tmp_path: Path) -> None:
    figures = _quick_run(marked, tmp_path, "--engine", "ollama")

    groups = {row["group"] for row in figures["rows"] if row["title"].startswith("a token's way")}
    assert groups == {"Ollama's stand-in, Ollama's own JSON", "Ollama's stand-in, OpenAI's JSON"}


def test_peer_without_a_place_for_its_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no plugin\.yaml"):
        read_peer(tmp_path, tmp_path)
    shape = {"provider": {"name": "peer"}, "platforms": {platform_key(): {"executable": "bin/x"}}}
    (tmp_path / "plugin.yaml").write_text(yaml.safe_dump(shape), encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"provider\.engine_host"):
        read_peer(tmp_path, tmp_path)


def test_only_far_worse_ratios_and_faults_are_complained_about() -> None:
    results = Results()
    results.begin_round()
    for row, direct, plugin in ((ADDED, 1, 10), (RATE, 100, 10)):
        results.add(row, DIRECT, [direct])
        results.add(row, PLUGIN, [plugin])
    faulty = Row("group", FAULTY, "%")
    results.add(faulty, PLUGIN, [0.0])
    rows = results.to_json()

    assert list(worse(rows, {"group": {"latency": 6, "tokens/s": 0.15, "gone": 1}})) == []
    found = list(worse(rows, {"group": {"latency": 2, "tokens/s": 0.5}}))
    assert [line.rpartition(": ")[2] for line in found] == ["5.0 times worse", "5.0 times worse"]
    results.add(faulty, PLUGIN, [12.5])
    assert list(worse(results.to_json(), {})) == [
        "group: up to 12.5 % of the plugin's streams lost or reordered lines"
    ]


def test_picture_has_every_comparison() -> None:
    results = Results()
    results.begin_round()
    for way, value in ((DIRECT, 4.0), (PLUGIN, 2.0), ("peer", 8.0)):
        results.add(BESIDE, way, [value])

    assert _texts(plot(results.to_json())) >= {"group", "memory (MiB)", "direct", "peer"}
    assert results.compared(BESIDE) == Spread(0.5, 0.5, 0.5, 0.5, 1)
    assert results.compared(BESIDE, "peer") == Spread(0.25, 0.25, 0.25, 0.25, 1)


def test_plugin_is_compared_within_a_round() -> None:
    results = Results()
    for direct in (1.0, 10.0, 100.0):  # the machine is slower from round to round; the plugin adds the same
        results.begin_round()
        results.add(ADDED, DIRECT, [direct, direct, direct * 5])
        results.add(ADDED, PLUGIN, [direct + 2])
        results.add(RATE, PLUGIN, [direct / 2])
        results.add(RATE, DIRECT, [direct])

    assert results.compared(ADDED) == Spread(2, 2, 2, 2, 3)
    assert results.compared(RATE) == Spread(0.5, 0.5, 0.5, 0.5, 3)
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
    assert results.to_json()[0]["ways"]["plugin"] == {"median": 1, "p10": 1, "p90": 1, "most": 1, "samples": 1}


def test_spread_interpolates_between_samples() -> None:
    spread = Spread.of([4, 1, 2, 3, 5])

    assert (spread.median, spread.samples) == (3, 5)
    assert (spread.p10, spread.p90) == pytest.approx((1.4, 4.6))
